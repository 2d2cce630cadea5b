# SPDX-License-Identifier: Apache-2.0
"""Predictions over HTTP: the Open Inference Protocol, version 2, with binary tensors.

`server.serve` runs it. The way of a request: `protocol` (bytes of HTTP) -> `app` (limits, token) ->
`paths` (what is asked) -> `requests` (the tensors of a body) -> `batcher` (who goes together) ->
`service` (the store) -> `responses`. Needs the extra ``serve``. Only the command line and
`pydedup.ray` import it.
"""
