"""A do-nothing Triton backend named "cpu", so that Triton's interpreter runs without a GPU.

Put this folder on PYTHONPATH with TRITON_INTERPRET=1 to run vLLM's V2 model runner on a CPU.
It must be absent when the V1 runner runs: vLLM would take Triton for usable.
"""
