# SPDX-License-Identifier: Apache-2.0
"""The way in: sources to matched blocks to staged pages to a published model.

add.py does it all. plan.py says what is to be added; tensors.py reads it; match.py finds what the
store has already, and similar.py what a new block is near to (candidates.py, aligned.py);
previous.py takes over what the version before had; replace.py and accuracy.py search for what a
metric allows (searches.py, trial.py, judging.py, confidence.py); spool.py holds what is new until
its layout is known; write.py and pages.py stage it, publish.py publishes. workers.py and ahead.py
do some of that before its turn. Nothing here serves predictions.
"""
