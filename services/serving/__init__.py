"""A model that learns while it serves: gateway, engines, windows of training, and the releases that come of them.

    application ─► gateway ─┬─► engine of the served release ─► answer, receipt
                            └─► inbox ─► window: `sdft train` ─► candidate ─► gate ─► release ─► engines

Imports planning, data, records, releases and inbox. A window is trained by another process. Only the process of an
engine (`engine_process.py`) imports ray, torch and vLLM.
"""
