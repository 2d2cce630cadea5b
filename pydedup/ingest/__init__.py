# SPDX-License-Identifier: Apache-2.0
"""The way in: sources to matched blocks to staged pages to a published model.

add.py does it all, a step after the other:

- plan.py says what is to be added, cuts.py into which blocks, staged.py what becomes of it;
- tensors.py reads and matches a model: match.py finds what the store has already (met.py: what
  this add has met), similar.py what a new block is near to (candidates.py, stored_index.py,
  aligned.py, alike.py, pairs.py; seen together, low_rank.py and transposed.py) and how it is kept
  then (deltas.py), families.py what is kept whole for others; previous.py takes over what the
  version before had; names.py finds a tensor whose name has another prefix there;
- artifacts.py matches what is large beside the weights;
- replace.py and accuracy.py search for what a metric allows (searches.py, trial.py, judging.py,
  confidence.py);
- quota.py asks whether there may be so much; pages.py and write.py stage it, publish.py publishes.

Blocks are read through places.py, wherever they are: on pages of the store (stored_table.py,
scan.py), or new and on the spool until their layout is known (spool.py). workers.py and ahead.py do
some of the work before its turn. Nothing here serves predictions.
"""
