"""Fused operations for GPUs, in Triton. The rest of the learner imports them; this room imports neither.

kernels.py     the kernels, one for each pass over memory
operations.py  those of layers and loss as operations of torch: Triton on a GPU, the plain formula on a CPU
adamw.py       that of the optimizer's step
check.py       whether they work on this machine's GPU
"""
