"""Tensors as bytes, and as safetensors files that a killed writer leaves nothing of."""

import json

import torch

# The names of safetensors' types.  Source: its format page.
# fmt: off
TYPES = {
    torch.float32: "F32", torch.bfloat16: "BF16", torch.float16: "F16", torch.float64: "F64",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8",
    torch.bool: "BOOL", torch.uint8: "U8",
}
# fmt: on


def bytes_of(tensor):
    """The bytes of a tensor of any type, on any device, (n,) uint8."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def write_tensors(tensors, metadata, path):
    """A safetensors file.  The library's writer leaves a copy under a name of its own when it is
    killed, and asks for no permissions but the owner's."""
    header, end = {"__metadata__": metadata} if metadata else {}, 0
    for name, value in tensors.items():
        size = value.numel() * value.element_size()
        told = dict(dtype=TYPES[value.dtype], shape=list(value.shape))
        header[name] = dict(told, data_offsets=[end, end + size])
        end += size
    head = json.dumps(header, separators=(",", ":")).encode()
    head += b" " * (-len(head) % 8)
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        for value in tensors.values():
            file.write(bytes_of(value).data)
