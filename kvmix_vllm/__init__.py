"""kvmix in vLLM: a plugin that serves a model with the KV cache of a plan (docs/serving.md).

Installed, it does nothing until a server is asked for it: `--additional-config '{"kvmix": {"plan": "plan.json"}}'`.
"""
