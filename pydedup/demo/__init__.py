# SPDX-License-Identifier: Apache-2.0
"""``pydedup demo``: the paper's text-classification workload on real vectors, text and models.

``packages.py`` fetches, ``data.py`` reads, ``models.py`` and ``train.py`` make a family of
classifiers, ``run.py`` stores it, predicts from the store and checks every claim it prints. The
demo uses pydedup through its public names only, and needs the extra ``demo`` (torch, pyarrow).
"""
