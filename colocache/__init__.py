# SPDX-License-Identifier: Apache-2.0
"""colocache: the COLO cache of a secondary virtual machine.

`Memory` makes the shared memory of a secondary, `Cache` runs on it; `RamImage` and `Sender` are the primary's half.
README.md has an example; the order of the calls, and what is promised, are in colocache.h (see `include_dir`).
"""

from pathlib import Path

from colocache.block import Block, Blocks
from colocache.cache import Cache
from colocache.dirty_log import DirtyLog, KvmDirtyLog, KvmSlot, UffdDirtyLog, UffdRange
from colocache.errors import (
    ArgumentError,
    BlockError,
    BusyError,
    ClosedError,
    ColocacheError,
    CorruptError,
    EpochError,
    ExistsError,
    FailedOverError,
    ForeignImageError,
    IncompleteError,
    LayoutError,
    LengthError,
    LoadFailedError,
    LogLostError,
    MemoryShortError,
    NoMemoryError,
    NoStateError,
    NotColocacheError,
    NotSealedError,
    OrderError,
    PacketError,
    PeerLostError,
    RangeError,
    SealedError,
    SystemCallError,
    TailError,
    TimedOutError,
    TooLargeError,
    UnsupportedError,
    VetoError,
)
from colocache.inspection import inspect
from colocache.memory import Memory
from colocache.ram_image import RamImage
from colocache.regions import CleanReport, RegionName, clean, list_regions
from colocache.results import (
    Action,
    BlockInfo,
    Failover,
    FlushResult,
    Header,
    Inspection,
    Phase,
    Recovery,
    SealResult,
    SendResult,
    Status,
)
from colocache.sender import HEADER_BYTES, MSG_PAGES, WIRE_VERSION, Sender, message_header, parse_header
from colocache.spec import BlockSpec, Images

__version__ = "0.1.0"


def include_dir() -> Path:
    """Where colocache.h is, for a C compiler's -I."""
    return Path(__file__).parent / "include"


def library_dir() -> Path:
    """Where libcolocache.so and libcolocache.a are, for a C compiler's -L."""
    return Path(__file__).parent / "lib"


__all__ = [
    "HEADER_BYTES",
    "MSG_PAGES",
    "WIRE_VERSION",
    "Action",
    "ArgumentError",
    "Block",
    "BlockError",
    "BlockInfo",
    "BlockSpec",
    "Blocks",
    "BusyError",
    "Cache",
    "CleanReport",
    "ClosedError",
    "ColocacheError",
    "CorruptError",
    "DirtyLog",
    "EpochError",
    "ExistsError",
    "FailedOverError",
    "Failover",
    "FlushResult",
    "ForeignImageError",
    "Header",
    "Images",
    "IncompleteError",
    "Inspection",
    "KvmDirtyLog",
    "KvmSlot",
    "LayoutError",
    "LengthError",
    "LoadFailedError",
    "LogLostError",
    "Memory",
    "MemoryShortError",
    "NoMemoryError",
    "NoStateError",
    "NotColocacheError",
    "NotSealedError",
    "OrderError",
    "PacketError",
    "PeerLostError",
    "Phase",
    "RamImage",
    "RangeError",
    "Recovery",
    "RegionName",
    "SealResult",
    "SealedError",
    "SendResult",
    "Sender",
    "Status",
    "SystemCallError",
    "TailError",
    "TimedOutError",
    "TooLargeError",
    "UffdDirtyLog",
    "UffdRange",
    "UnsupportedError",
    "VetoError",
    "clean",
    "include_dir",
    "inspect",
    "library_dir",
    "list_regions",
    "message_header",
    "parse_header",
]
