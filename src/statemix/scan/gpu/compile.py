"""The kernels of csrc/gpu, compiled at first use: for a GPU by NVRTC, for its emulation on a CPU by g++.

A kernel is a program of csrc/gpu with its template arguments. It is called with the bytes of one struct, `Scan` in
csrc/gpu/scan.cuh. NVIDIA's own bindings are imported at the first call for a GPU.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

STORAGES = {torch.float32: "float", torch.bfloat16: "Bfloat16", torch.float16: "Float16"}
OLDEST_ARCHITECTURE = 80  # copies to shared memory that nobody waits for begin with it
EMULATED = os.environ.get("STATEMIX_EMULATE_GPU") == "1"  # the backend serves CPU tensors, slowly, for tests

_HAS_BINDINGS = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.bindings") is not None
_CHECKOUT = Path(__file__).parents[4]  # of the sources, unless the package was installed without them
_INSTALLED = Path(__file__).parent / "csrc" / "gpu"
_COMPILER_OPTIONS = ["-std=c++20", "-O1", "-fPIC", "-shared", "-w", "-fno-gnu-unique", "-DSTATEMIX_EMULATE"]


class Kernel(NamedTuple):
    """A program of csrc/gpu and its template arguments.

    family: its file. numbers: what it shares out time and threads by, and may be chosen freely.
    """

    family: str
    program: str
    dtype: torch.dtype
    order: int
    normalization: str
    has_reset: bool
    numbers: tuple[int | str, ...]

    @property
    def source(self) -> str:
        """All that is compiled, but for what it includes."""
        arguments = [
            STORAGES[self.dtype],
            str(self.order),
            f"statemix::Normalization::{self.normalization}",
            str(self.has_reset).lower(),
            *(str(number) for number in self.numbers),
        ]
        program = f"statemix::{self.program}<{', '.join(arguments)}>"
        return f'#include "{self.family}.cuh"\nusing namespace statemix;\nSTATEMIX_KERNEL({program})\n'


class Size(NamedTuple):
    """Threads of a program of a compiled kernel, blocks n that it serves, and bytes that it shares."""

    threads: int
    blocks: int
    shared_bytes: int


def load_problem() -> str | None:
    """Why no kernel can be run here, in a sentence; None if one can."""
    if EMULATED:
        return None
    if torch.version.hip is not None:
        return "its kernels are for NVIDIA cards, and this torch was built for AMD's."
    if not torch.cuda.is_available():
        return "it needs a GPU, and torch finds none here."
    if not _HAS_BINDINGS:
        return "it needs cuda-bindings and NVRTC, which are not installed: pip install 'statemix[gpu]'."
    return None


def architecture(device: torch.device) -> int:
    """90 for compute capability 9.0."""
    properties = torch.cuda.get_device_properties(
        device
    )  # torch.compile takes it as a constant, but no cached function
    return 10 * properties.major + properties.minor


def unserved_device(device: torch.device) -> str | None:
    """Why kernels do not serve tensors of this device; None if they do."""
    wanted = "cpu" if EMULATED else "cuda"
    if device.type != wanted:
        return f"it needs {wanted.upper()} tensors, got device {device}."
    if not EMULATED and architecture(device) < OLDEST_ARCHITECTURE:
        found = architecture(device)
        return f"it needs compute capability 8.0, got {found // 10}.{found % 10}."
    return None


@functools.cache
def headers() -> dict[str, str]:
    """The text of every file of csrc/gpu by its name."""
    checkout = _CHECKOUT / "csrc" / "gpu"
    folder = checkout if checkout.is_dir() else _INSTALLED
    return {path.name: path.read_text() for path in sorted(folder.glob("*.cuh"))}


@functools.cache
def compiler_version() -> str:
    """Of NVRTC. Raises RuntimeError if it is not installed."""
    if not _HAS_BINDINGS:
        raise RuntimeError("scan: cuda-bindings and NVRTC are not installed: pip install 'statemix[gpu]'.")
    from cuda.bindings import nvrtc

    _, major, minor = nvrtc.nvrtcVersion()
    return f"{major}.{minor}"


@functools.cache
def compile_for_gpu(kernel: Kernel, target: int) -> tuple[bytes, Size]:
    """Machine code for cards of compute capability `target`, 90 for 9.0. No card is needed.

    Raises:
        RuntimeError: NVRTC refuses the source; its log is the message.
    """
    from cuda.bindings import nvrtc

    def check(result: Any, *values: Any) -> Any:
        if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            _, size = nvrtc.nvrtcGetProgramLogSize(program)
            log = bytes(size)
            nvrtc.nvrtcGetProgramLog(program, log)
            raise RuntimeError(f"scan: NVRTC cannot compile {kernel}: {result.name}\n{log.decode()}")
        return values[0] if values else None

    texts = headers()
    _, program = nvrtc.nvrtcCreateProgram(
        kernel.source.encode(),
        b"kernel.cu",
        len(texts),
        [text.encode() for text in texts.values()],
        [name.encode() for name in texts],
    )
    sizes = b"numbers<Program::kThreads, Program::kBlocks, sizeof(Program::Shared)>"
    options = [f"--gpu-architecture=sm_{target}".encode(), b"-std=c++17", b"-default-device"]
    check(*nvrtc.nvrtcAddNameExpression(program, sizes))
    check(*nvrtc.nvrtcCompileProgram(program, len(options), options))
    name = check(*nvrtc.nvrtcGetLoweredName(program, sizes)).decode()
    code = bytes(check(*nvrtc.nvrtcGetCUBINSize(program)))
    check(*nvrtc.nvrtcGetCUBIN(program, code))
    nvrtc.nvrtcDestroyProgram(program)
    return code, Size(*(int(number) for number in re.findall(r"Li(\d+)E", name)))


def size_of(kernel: Kernel, device: torch.device) -> Size:
    """The size of a kernel as it is compiled for a device."""
    return load(kernel, device)[1] if EMULATED else compile_for_gpu(kernel, architecture(device))[1]


@functools.cache
def shared_limit(device: torch.device) -> int:
    """How many bytes the threads of a program may share."""
    if EMULATED:
        return 227 << 10
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin  # type: ignore[attr-defined] # its annotations lack it


@functools.cache
def load(kernel: Kernel, device: torch.device) -> tuple[Callable[[bytes, int], None], Size]:
    """A function that runs a kernel for the bytes of its struct and a number of programs; and the kernel's size."""
    return _load_emulated(kernel) if EMULATED else _load_on_gpu(kernel, device)


def _load_on_gpu(kernel: Kernel, device: torch.device) -> tuple[Callable[[bytes, int], None], Size]:
    from cuda.bindings import driver

    def check(result: Any, *values: Any) -> Any:
        if result != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeError(f"scan: {result.name} from the CUDA driver for {kernel}.")
        return values[0] if values else None

    code, size = compile_for_gpu(kernel, architecture(device))
    context = check(*driver.cuDevicePrimaryCtxRetain(check(*driver.cuDeviceGet(device.index))))
    check(*driver.cuCtxPushCurrent(context))
    module = check(*driver.cuModuleLoadData(code))
    function = check(*driver.cuModuleGetFunction(module, b"kernel"))
    attribute = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    check(*driver.cuFuncSetAttribute(function, attribute, size.shared_bytes))
    check(*driver.cuCtxPopCurrent())
    stream = functools.partial(torch._C._cuda_getCurrentRawStream, device.index)
    return launcher(driver, check, context, function, size, stream), size


def launcher(
    driver: Any, check: Callable[..., Any], context: Any, function: Any, size: Size, stream: Callable[[], int]
) -> Callable[[bytes, int], None]:
    """What runs a function of the driver on the stream of the moment.

    In its own context: a thread of autograd has none before torch's first call for the card in it, and the current one
    may be that of another card.
    """

    def run(arguments: bytes, programs: int) -> None:
        parameter = ctypes.c_char_p(arguments)  # the address of the struct, the only one
        check(*driver.cuCtxPushCurrent(context))
        try:
            check(
                *driver.cuLaunchKernel(
                    function,
                    programs,
                    1,
                    1,
                    size.threads,
                    1,
                    1,
                    size.shared_bytes,
                    stream(),
                    ctypes.addressof(parameter),
                    0,
                )
            )
        finally:
            check(*driver.cuCtxPopCurrent())

    return run


class Resources(NamedTuple):
    """What a thread of a compiled kernel takes: registers, and bytes of local memory, which are spills."""

    registers: int
    spilled: int


def resources(code: bytes) -> Resources:
    """Of machine code that `compile_for_gpu` made, as NVIDIA's cuobjdump reads it.

    Raises:
        RuntimeError: cuobjdump is not there: pip install nvidia-cuda-cuobjdump.
    """
    found = [Path(folder) / "cuobjdump" for folder in sorted(Path(torch.__file__).parents[1].glob("nvidia/*/bin"))]
    program = shutil.which("cuobjdump") or next((str(path) for path in found if path.exists()), None)
    if program is None:
        raise RuntimeError("scan: cuobjdump is not there: pip install nvidia-cuda-cuobjdump.")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(code)
        file.flush()
        command = [program, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(\w+):(\d+)", text[text.index("Function kernel:") :]))
    return Resources(int(usage["REG"]), int(usage["STACK"]) + int(usage["LOCAL"]))


def _load_emulated(kernel: Kernel) -> tuple[Callable[[bytes, int], None], Size]:
    library = ctypes.CDLL(str(build_emulated(kernel)))
    library.kernel.restype = ctypes.c_char_p
    library.kernel.argtypes = [ctypes.c_char_p, ctypes.c_int, ctypes.c_uint]

    def run(arguments: bytes, programs: int) -> None:
        problem = library.kernel(arguments, programs, int(os.environ.get("STATEMIX_EMULATE_SEED", "0")))
        if problem is not None:
            raise RuntimeError(f"scan: {problem.decode()} in {kernel}.")

    return run, Size(*(ctypes.c_int * 3).in_dll(library, "numbers"))


def build_emulated(kernel: Kernel, options: tuple[str, ...] = ()) -> Path:
    """A library with the kernel for a CPU, made by g++ unless the user's cache has it.

    Raises:
        RuntimeError: there is no g++ or it refuses the source.
    """
    emulator = (_CHECKOUT / "tests" / "emulate.h").read_text()
    texts = {**headers(), "emulate.h": emulator, "kernel.cpp": kernel.source}
    command = [os.environ.get("CXX", "g++"), *_COMPILER_OPTIONS, *options]
    key = hashlib.sha256(repr((command, texts)).encode()).hexdigest()[:32]
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "statemix"
    library = cache / f"{key}.so"
    if library.exists():
        return library
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as name:
        folder = Path(name)
        for file, text in texts.items():
            (folder / file).write_text(text)
        built = subprocess.run(
            [*command, f"-I{folder}", str(folder / "kernel.cpp"), "-o", str(folder / "kernel.so")],
            capture_output=True,
            text=True,
        )
        if built.returncode != 0:
            raise RuntimeError(f"scan: {command[0]} cannot compile {kernel}:\n{built.stderr}")
        (folder / "kernel.so").replace(library)  # whole or not at all, also where two processes build it
    return library
