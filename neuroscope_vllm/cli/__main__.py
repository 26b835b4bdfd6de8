"""`python -m neuroscope_vllm.cli`."""

from neuroscope_vllm.cli.main import main

main()
