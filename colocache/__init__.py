# SPDX-License-Identifier: Apache-2.0
"""colocache: the COLO cache of a secondary virtual machine.

`Memory` makes the shared memory of a secondary, `Cache` runs on it; `RamImage` and `Sender` are the primary's half.
README.md has an example; the order of the calls, and what is promised, are in colocache.h (`include_dir` says where).

Names are loaded when they are first used, so that a command is at work, and hears Ctrl-C, before numpy is there. Their
types stand in __init__.pyi.
"""

__version__ = "0.1.0"

# module: its names
_PUBLIC = {
    "block": "Block Blocks",
    "cache": "Cache",
    "config_tool": "include_dir lib_dir",
    "dirty_log": "DirtyLog KvmDirtyLog KvmDirtyRing KvmRing KvmSlot ProcessDirtyLog UffdDirtyLog UffdRange",
    "errors": "ArgumentError BlockError BusyError ClosedError ColocacheError CorruptError EpochError ExistsError "
    "FailedOverError ForeignImageError IncompleteError LayoutError LengthError LoadFailedError "
    "LogLostError MemoryModeError MemoryShortError NoMemoryError NoStateError NotColocacheError NotSealedError "
    "OrderError PacketError PeerLostError RangeError ReceivingError SealedError StrategyError SystemCallError "
    "TailError TimedOutError TooLargeError UnsupportedError VetoError",
    "inspection": "inspect",
    "memory": "Memory",
    "private": "private_bytes private_forget private_write_back",
    "ram_image": "RamImage",
    "regions": "CleanReport RegionName clean list_regions",
    "results": "Action Attachment BlockInfo Failover FlushResult Header Inspection PageRun Phase Recovery SealResult "
    "SendResult Stats Status",
    "sender": "HEADER_BYTES MSG_PAGES Sender WIRE_VERSION message_header parse_header",
    "spec": "BlockSpec Images",
}
_MODULE_OF = {name: f"colocache.{module}" for module, names in _PUBLIC.items() for name in names.split()}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 -- a list of names, which only has no literal here


def __getattr__(name: str) -> object:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    found = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
