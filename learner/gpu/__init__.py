"""Fused operations for GPUs, in Triton. learner.model and learner.loss import them; this room imports neither.

kernels.py     the kernels, one for each pass over memory
operations.py  the kernels as operations of torch: Triton on a GPU, the plain formula on a CPU, shapes on meta
"""
