"""The four kernels, and the stages they share.

A kernel takes records (:mod:`.params`): the tensors of a call, the params of its problem, and how the work is tiled.
"""
