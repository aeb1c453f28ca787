"""The four kernels, and the stages they share.

A kernel takes records (:mod:`.params`), one for each part of a problem, and hands them on to its stages.
"""
