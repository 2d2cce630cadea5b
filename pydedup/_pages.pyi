# SPDX-License-Identifier: Apache-2.0
from collections.abc import Iterable

from typing_extensions import Buffer

def split_payload(payload: Buffer, part_bytes: int) -> list[memoryview]: ...
def join_parts(parts: Iterable[Buffer]) -> bytes: ...
