"""The vLLM engine: the only code that imports vllm.

plugin.py     entry point; wraps three vLLM seams, nothing else
front.py      front process: resolve, check, start the side process
settings.py   what the front process tells the workers
refusals.py   configurations we can not serve truthfully
models/       model classes whose decoder loop calls the hook
hook.py       ActivationHook and its custom op, inside the compiled graph
step.py       whose rows are in a step, for the V1 and V2 runners
pipeline.py   rows to top features to messages, beside the engine's loop
worker.py     ties the four above together in a worker process
scheduler.py  the truth about tokens, from the scheduler
"""
