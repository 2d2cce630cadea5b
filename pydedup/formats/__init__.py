# SPDX-License-Identifier: Apache-2.0
"""Model files in and out: one module per format, and a registry that chooses among them.

Nothing is imported here: formats bring optional libraries, and import them only when used.
"""
