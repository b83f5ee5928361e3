"""TFRecord files and `tf.train.Example`s, written byte by byte."""

import struct


def divided(register):
    """The remainder of eight bits, in a division of polynomials bit by bit."""
    for _ in range(8):
        register = (register >> 1) ^ (0x82F63B78 * (register & 1))
    return register


REMAINDERS = [divided(byte) for byte in range(256)]


def crc32c(data):
    register = 0xFFFFFFFF
    for byte in data:
        register = (register >> 8) ^ REMAINDERS[(register ^ byte) & 255]
    return register ^ 0xFFFFFFFF


def masked(data):
    crc = crc32c(data)
    return struct.pack("<I", (((crc >> 15) | (crc << 17)) + 0xA282EAD8) % 2**32)


def framed(data):
    """A record of a file."""
    length = struct.pack("<Q", len(data))
    return length + masked(length) + data + masked(data)


def varint(number):
    number %= 2**64
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes([*out, number])


def field(number, data):
    return varint(number << 3 | 2) + varint(len(data)) + data
