"""The names that transformers imports from torchvision when vLLM imports Gemma 3's image processor.

Registries have torchvision for CUDA builds of torch alone, and it can not be loaded beside a CPU
build. vLLM needs it to know the architecture, but runs none of it where no image is taken.
"""

__version__ = "0.28.0"
