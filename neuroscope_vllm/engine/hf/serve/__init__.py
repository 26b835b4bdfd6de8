"""An OpenAI-compatible server on `transformers serve`'s own classes, with features beside it.

One sequence runs at a time, and the others wait in order. Batches would need continuous batching,
which on MPS takes attention kernels that are not the model's own.
"""
