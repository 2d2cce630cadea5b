# SPDX-License-Identifier: Apache-2.0
"""The way in: sources to matched blocks to staged pages to a published model.

plan.py says what is to be added, match.py finds what the store has already, spool.py holds what
is new until its layout is known, write.py stages and publishes. Nothing here serves predictions.
"""
