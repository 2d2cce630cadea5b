# SPDX-License-Identifier: Apache-2.0
"""Predictions over HTTP on Ray Serve.

A `front` takes requests and knows which models share pages (`families`); it hands each request to
a `replica`, which `router` chooses so that models of one family meet in one buffer pool
(`placement`). `application` puts these together.
"""
