"""Values between a stranger's program and the test program that judges it: plain data, written as JSON.

What is read is made of built-in types only, so nothing that comes back from the program can bring a method of
its own (`__eq__`, say) with it. Standard library only.
"""

from __future__ import annotations

import builtins
import json
import socket
import struct
from collections.abc import Callable, Iterator
from typing import Any

_LENGTH = struct.Struct("=Q")
LONGEST = 1 << 30  # bytes of a message


class Remote:
    """An object that is no plain data: it stays in the program, and can be handed back to it."""

    __slots__ = ("number",)

    def __init__(self, number: int) -> None:
        self.number = number


def send(to: socket.socket, message: Any) -> None:
    """A message of JSON. OSError where nobody reads."""
    data = json.dumps(message).encode()
    to.sendall(_LENGTH.pack(len(data)) + data)


def receive(of: socket.socket) -> Any:
    """The next message. EOFError where there will be none, ValueError where it is none."""
    (length,) = _LENGTH.unpack(_exactly(of, _LENGTH.size))
    if length > LONGEST:
        raise ValueError(f"a message of {length} bytes")
    return json.loads(_exactly(of, length))


def _exactly(of: socket.socket, count: int) -> bytes:
    parts = []
    while count:
        part = of.recv(min(count, 1 << 20))
        if not part:
            raise EOFError("the other end is closed")
        parts.append(part)
        count -= len(part)
    return b"".join(parts)


_SEQUENCES: dict[str, Callable[..., Any]] = {"tuple": tuple, "set": set, "frozenset": frozenset, "iter": iter}


def pack(value: Any, keep: Callable[[Any], int] | None = None) -> Any:
    """As what JSON can write. keep: takes an object that is no plain data and gives it a number; without it
    such an object raises TypeError.
    """
    if isinstance(value, Remote):
        return {"is": "object", "of": value.number}
    if value is None or isinstance(value, (bool, str)):
        return value if value is None or type(value) in (bool, str) else str(value)
    if isinstance(value, int):
        return {"is": "int", "of": hex(value)}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, complex):
        return {"is": "complex", "of": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"is": "bytes", "of": bytes(value).hex()}
    if isinstance(value, list):
        return [pack(item, keep) for item in value]
    if isinstance(value, dict):
        pairs = [[pack(key, keep), pack(item, keep)] for key, item in value.items()]
        return {"is": "dict", "of": pairs}
    for name, kind in (("tuple", tuple), ("frozenset", frozenset), ("set", set), ("iter", Iterator)):
        if isinstance(value, kind):
            return {"is": name, "of": [pack(item, keep) for item in value]}
    if isinstance(value, range):
        return {"is": "range", "of": [hex(part) for part in (value.start, value.stop, value.step)]}
    if hasattr(value, "tolist"):  # numpy's arrays and numbers
        return pack(value.tolist(), keep)
    if keep is None:
        raise TypeError(f"{type(value).__name__} is no plain data")
    return {"is": "object", "of": keep(value)}


def unpack(value: Any, look_up: Callable[[int], Any] = Remote) -> Any:
    """The value again. look_up: what a number stands for. Raises something for what pack never makes."""
    if isinstance(value, list):
        return [unpack(item, look_up) for item in value]
    if not isinstance(value, dict):
        return value
    kind, of = value["is"], value["of"]
    if kind == "int":
        return int(of, 16)
    if kind == "object":
        return look_up(of)
    if kind == "complex":
        return complex(*of)
    if kind == "bytes":
        return bytes.fromhex(of)
    if kind == "dict":
        return {unpack(key, look_up): unpack(item, look_up) for key, item in of}
    if kind == "range":
        return range(*(int(part, 16) for part in of))
    return _SEQUENCES[kind](unpack(item, look_up) for item in of)


class Stub:
    """A name of the program's, called from the test program: arguments go there, the result comes back."""

    def __init__(self, name: str, channel: socket.socket) -> None:
        self.__name__ = name
        self._channel = channel

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        message = {"call": self.__name__, "args": pack(list(args)), "kwargs": pack(kwargs)}
        send(self._channel, message)
        answer = receive(self._channel)
        if "raised" in answer:
            raise exception(answer["raised"])(answer.get("said"))
        return unpack(answer["value"])


def exception(name: Any) -> type[Exception]:
    """The built-in exception of that name, else RuntimeError; never one that ends a loop quietly."""
    found = getattr(builtins, name, None) if isinstance(name, str) else None
    if not isinstance(found, type) or not issubclass(found, Exception):
        return RuntimeError
    return RuntimeError if issubclass(found, (StopIteration, StopAsyncIteration)) else found
