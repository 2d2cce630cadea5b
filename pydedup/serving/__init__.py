# SPDX-License-Identifier: Apache-2.0
"""Serving from a store: tensors that stay on their pages, and graphs run on them.

tensor.py computes with one stored tensor, engine.py runs a graph (plan.py says beforehand what it
needs, stacks.py which layers run as one, weightless.py and pooling.py compute what has no weights),
predict.py cuts batches and puts requests together, signature.py says what a graph takes and
returns. onnx_session.py runs models that only ONNX Runtime can (onnx_kept.py: what it has ready;
onnx_own.py: models that are asked again; onnx_values.py: what it takes and gives). layers.py and
attached/ are for torch modules. For predictions in SQL, features.py turns rows into inputs,
score.py writes a table (score_table.py) at one version (pin.py), and calls.py is what functions
call. on_demand.py gives writers of files what they ask for.

Deliberately not here: how models get into a store (:mod:`pydedup.ingest`).
"""
