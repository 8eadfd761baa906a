"""Passes over tensors on a CPU in C, compiled on the machine that runs them where it has a compiler.

Each does at once what takes PyTorch several operations with a tensor in memory between them. Without a
compiler nothing is lost but time: whoever calls them has the same in PyTorch.
"""
