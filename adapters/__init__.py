# SPDX-License-Identifier: Apache-2.0
"""Adapters to databases; empty on purpose, so that importing it loads no driver."""
