"""The calls of CUDA's driver that a pool in GPU memory takes, by ctypes: who holds such a pool need not load torch.

Structs, numbers and prototypes are those of cuda.h (the same from CUDA 11 to 13.1). No GPU has run this yet: a test
compiles a stand-in for the driver against the real header and runs every call through it.
"""

import ctypes
import os
from dataclasses import dataclass
from functools import cache
from typing import Any

LIBRARY = "libcuda.so.1"
SUCCESS, OUT_OF_MEMORY = 0, 2
PINNED = 1  # CU_MEM_ALLOCATION_TYPE_PINNED
ON_DEVICE = 1  # CU_MEM_LOCATION_TYPE_DEVICE
AS_FD = 1  # CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR
READ_AND_WRITE = 3  # CU_MEM_ACCESS_FLAGS_PROT_READWRITE
GRANULARITY_RECOMMENDED = 1
HAS_VIRTUAL_MEMORY, HAS_FD_HANDLES = 102, 103  # CUdevice_attribute


class MemLocation(ctypes.Structure):
    """CUmemLocation: 8 bytes."""

    _fields_ = (("type", ctypes.c_int), ("id", ctypes.c_int))


class AllocFlags(ctypes.Structure):
    """CUmemAllocationProp.allocFlags: 8 bytes."""

    _fields_ = (
        ("compressionType", ctypes.c_ubyte),
        ("gpuDirectRDMACapable", ctypes.c_ubyte),
        ("usage", ctypes.c_ushort),
        ("reserved", ctypes.c_ubyte * 4),
    )


class MemAllocationProp(ctypes.Structure):
    """CUmemAllocationProp: 32 bytes."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("requestedHandleTypes", ctypes.c_int),
        ("location", MemLocation),
        ("win32HandleMetaData", ctypes.c_void_p),
        ("allocFlags", AllocFlags),
    )


class MemAccessDesc(ctypes.Structure):
    """CUmemAccessDesc: 12 bytes."""

    _fields_ = (("location", MemLocation), ("flags", ctypes.c_int))


class Uuid(ctypes.Structure):
    """CUuuid: 16 bytes."""

    _fields_ = (("bytes", ctypes.c_ubyte * 16),)


_POINTER, _SIZE, _U64, _INT = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_ulonglong, ctypes.c_int
PROTOTYPES: dict[str, tuple[Any, ...]] = {
    "cuInit": (ctypes.c_uint,),
    "cuGetErrorString": (_INT, ctypes.POINTER(ctypes.c_char_p)),
    "cuDeviceGetCount": (ctypes.POINTER(_INT),),
    "cuDeviceGet": (ctypes.POINTER(_INT), _INT),
    "cuDeviceGetName": (ctypes.c_char_p, _INT, _INT),
    "cuDeviceGetUuid_v2": (ctypes.POINTER(Uuid), _INT),
    "cuDeviceTotalMem_v2": (ctypes.POINTER(_SIZE), _INT),
    "cuDeviceGetAttribute": (ctypes.POINTER(_INT), _INT, _INT),
    "cuDevicePrimaryCtxRetain": (ctypes.POINTER(_POINTER), _INT),
    "cuCtxGetCurrent": (ctypes.POINTER(_POINTER),),
    "cuCtxSetCurrent": (_POINTER,),
    "cuMemGetAllocationGranularity": (ctypes.POINTER(_SIZE), ctypes.POINTER(MemAllocationProp), _INT),
    "cuMemCreate": (ctypes.POINTER(_U64), _SIZE, ctypes.POINTER(MemAllocationProp), _U64),
    "cuMemRelease": (_U64,),
    "cuMemExportToShareableHandle": (_POINTER, _U64, _INT, _U64),
    "cuMemImportFromShareableHandle": (ctypes.POINTER(_U64), _POINTER, _INT),
    "cuMemAddressReserve": (ctypes.POINTER(_U64), _SIZE, _SIZE, _U64, _U64),
    "cuMemAddressFree": (_U64, _SIZE),
    "cuMemMap": (_U64, _SIZE, _SIZE, _U64, _U64),
    "cuMemUnmap": (_U64, _SIZE),
    "cuMemSetAccess": (_U64, _SIZE, ctypes.POINTER(MemAccessDesc), _SIZE),
    "cuMemcpyDtoH_v2": (_POINTER, _U64, _SIZE),
    "cuMemcpyHtoD_v2": (_U64, _POINTER, _SIZE),
    "cuStreamSynchronize": (_POINTER,),
}


class CudaError(OSError):
    """A call of the driver that failed; ``code`` is its CUresult, None if the driver is not there at all."""

    def __init__(self, sentence: str, *, code: int | None = None) -> None:
        super().__init__(sentence)
        self.code = code


@dataclass(frozen=True, slots=True)
class Gpu:
    """One GPU this process may use. ``uuid``, in hex, names it in every process; ``num_bytes`` is all its memory."""

    ordinal: int
    name: str
    uuid: str
    num_bytes: int


@cache
def cuda_driver() -> "CudaDriver":
    """Return this process's driver. Raises CudaError where there is none, and tries again when asked again."""
    return CudaDriver()


class CudaDriver:
    """The driver, initialised; there is no context, which takes some hundred MB on the GPU, before ``enter``.

    Methods may be called from any thread. All raise CudaError.
    """

    def __init__(self, library: str = LIBRARY) -> None:
        try:
            self._library = ctypes.CDLL(library)
        except OSError as error:
            raise CudaError(f"the driver of NVIDIA GPUs cannot be loaded: {error}") from None
        for name, types in PROTOTYPES.items():
            function = getattr(self._library, name, None)
            if function is None:
                raise CudaError(f"the driver of NVIDIA GPUs is too old: it has no {name}")
            function.argtypes, function.restype = types, ctypes.c_int
        self._contexts: dict[int, ctypes.c_void_p] = {}
        self._call("cuInit", 0)

    def _call(self, name: str, *arguments: Any) -> None:
        code = getattr(self._library, name)(*arguments)
        if code != SUCCESS:
            text = ctypes.c_char_p()
            self._library.cuGetErrorString(code, ctypes.byref(text))
            words = text.value.decode(errors="replace") if text.value else "no error of that number is known"
            raise CudaError(f"{name} failed: {words} ({code})", code=code)

    # ---- devices -------------------------------------------------------------------------------------------------

    def gpus(self) -> tuple[Gpu, ...]:
        """Return the GPUs that this process may use, in the order of their ordinals."""
        count = ctypes.c_int()
        self._call("cuDeviceGetCount", ctypes.byref(count))
        return tuple(self._gpu(ordinal) for ordinal in range(count.value))

    def _gpu(self, ordinal: int) -> Gpu:
        device, name = self._device(ordinal), ctypes.create_string_buffer(256)
        found, num_bytes = Uuid(), ctypes.c_size_t()
        self._call("cuDeviceGetName", name, len(name), device)
        self._call("cuDeviceGetUuid_v2", ctypes.byref(found), device)
        self._call("cuDeviceTotalMem_v2", ctypes.byref(num_bytes), device)
        return Gpu(ordinal, name.value.decode(errors="replace"), bytes(found.bytes).hex(), num_bytes.value)

    def _device(self, ordinal: int) -> int:
        device = ctypes.c_int()
        self._call("cuDeviceGet", ctypes.byref(device), ordinal)
        return device.value

    def can_share(self, ordinal: int) -> bool:
        """Return whether memory of a GPU can be handed to other processes as a file descriptor."""
        value, device = ctypes.c_int(), self._device(ordinal)
        for attribute in (HAS_VIRTUAL_MEMORY, HAS_FD_HANDLES):
            self._call("cuDeviceGetAttribute", ctypes.byref(value), attribute, device)
            if not value.value:
                return False
        return True

    def enter(self, ordinal: int) -> None:
        """Make the GPU's primary context, torch's too, current in this thread; kept until the process ends."""
        context = self._contexts.get(ordinal)
        if context is None:
            context = ctypes.c_void_p()
            self._call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self._device(ordinal))
            self._contexts[ordinal] = context
        current = ctypes.c_void_p()
        self._call("cuCtxGetCurrent", ctypes.byref(current))
        if current.value != context.value:
            self._call("cuCtxSetCurrent", context)

    # ---- memory as a handle: no context, no address --------------------------------------------------------------

    def granularity(self, ordinal: int) -> int:
        """Return what sizes of memory that can be shared must be multiples of."""
        size = ctypes.c_size_t()
        prop = _shareable(ordinal)
        self._call("cuMemGetAllocationGranularity", ctypes.byref(size), ctypes.byref(prop), GRANULARITY_RECOMMENDED)
        return size.value

    def create(self, ordinal: int, num_bytes: int) -> int:
        """Allocate memory that can be shared, and return its handle."""
        handle, prop = ctypes.c_ulonglong(), _shareable(ordinal)
        self._call("cuMemCreate", ctypes.byref(handle), num_bytes, ctypes.byref(prop), 0)
        return handle.value

    def release(self, handle: int) -> None:
        """Give up a handle. The memory lasts as long as any process has a handle, a descriptor or a mapping of it."""
        self._call("cuMemRelease", handle)

    def export_fd(self, handle: int) -> int:
        """Return a new file descriptor, not inherited by children, that stands for the memory."""
        fd = ctypes.c_int(-1)
        self._call("cuMemExportToShareableHandle", ctypes.byref(fd), handle, AS_FD, 0)
        os.set_inheritable(fd.value, False)
        return fd.value

    def import_fd(self, fd: int) -> int:
        """Return a handle of the memory that a descriptor, which stays the caller's, stands for."""
        handle = ctypes.c_ulonglong()
        self._call("cuMemImportFromShareableHandle", ctypes.byref(handle), fd, AS_FD)
        return handle.value

    # ---- memory at an address ------------------------------------------------------------------------------------

    def map(self, handle: int, num_bytes: int, ordinal: int) -> int:
        """Map memory of a GPU for that GPU to read and write; return its address."""
        self.enter(ordinal)
        address = ctypes.c_ulonglong()
        self._call("cuMemAddressReserve", ctypes.byref(address), num_bytes, 0, 0, 0)
        is_mapped = False
        try:
            self._call("cuMemMap", address.value, num_bytes, 0, handle, 0)
            is_mapped = True
            access = MemAccessDesc(MemLocation(ON_DEVICE, ordinal), READ_AND_WRITE)
            self._call("cuMemSetAccess", address.value, num_bytes, ctypes.byref(access), 1)
        except CudaError:
            if is_mapped:
                self._call("cuMemUnmap", address.value, num_bytes)
            self._call("cuMemAddressFree", address.value, num_bytes)
            raise
        return address.value

    def unmap(self, address: int, num_bytes: int) -> None:
        """End a mapping, which no work of the GPU may be using."""
        self._call("cuMemUnmap", address, num_bytes)
        self._call("cuMemAddressFree", address, num_bytes)

    def copy_out(self, address: int, out: memoryview, ordinal: int) -> None:
        """Copy from the GPU into writable ``out``; returns when it is there."""
        self.enter(ordinal)
        self._call("cuMemcpyDtoH_v2", ctypes.addressof(ctypes.c_char.from_buffer(out)), address, out.nbytes)

    def copy_in(self, address: int, data: memoryview, ordinal: int) -> None:
        """Copy ``data`` to the GPU; returns when it is there."""
        self.enter(ordinal)
        if data.readonly:
            data = memoryview(bytearray(data))
        self._call("cuMemcpyHtoD_v2", address, ctypes.addressof(ctypes.c_char.from_buffer(data)), data.nbytes)
        self._call("cuStreamSynchronize", None)  # It had only been staged, perhaps.


def _shareable(ordinal: int) -> MemAllocationProp:
    return MemAllocationProp(PINNED, AS_FD, MemLocation(ON_DEVICE, ordinal))
