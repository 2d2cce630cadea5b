# SPDX-License-Identifier: Apache-2.0
"""Serving from a store: tensors that stay on their pages, and graphs run on them.

Deliberately not here: how models get into a store (:mod:`pydedup.ingest`).
"""
