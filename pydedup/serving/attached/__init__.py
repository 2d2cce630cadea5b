# SPDX-License-Identifier: Apache-2.0
"""What an attached torch module is made of; `pydedup.serving.layers` makes and unmakes it.

slots      which tensors of a module have their values in a store
weights    one version of a model as a module uses it: streamed tensors, loaded ones
parameter  the tensor that stands in a module where a parameter was
views      parts of it, transposed or in another dtype, that stay in the store
functions  what torch's functions do when they are given such a tensor: products
rows       the same, for look-ups of rows and bags of them
experts    matrices of mixtures of experts: loaded, or read piece by piece
norms      those with running statistics: what would change these is refused
recurrent  layers of many steps: loaded, or streamed step by step
activations  what torch allocates in a call, counted against the budget
pieces     how batches that are too large for the budget are cut
modules    what the modules themselves do otherwise: versions per call, refusals
"""
