# SPDX-License-Identifier: Apache-2.0
"""Weights: find them, read them safely, and refuse what does not fit, saying why.

Only safetensors and ``torch.load(weights_only=True)`` are ever used: neither runs a file's code
(the latter by PyTorch that is not known to do it all the same).
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
import json
import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

from perceiver_flow_ros.model.lite import LiteConfig, LitePerceiver
from perceiver_flow_ros.model.official import OfficialConfig, OfficialNetwork, Positions
import torch
from torch import nn, Tensor

CONFIG = 'config.json'
FILES = ('model.safetensors', 'pytorch_model.bin')      # as save_pretrained names them
LITE = 'lite.safetensors'       # as `perceiver_flow train` does
SAFE = (2, 10)          # PyTorch before it: CVE-2025-32434, CVE-2026-24747
PYTORCH = b'PK', b'\x80'   # how files of torch.save begin: a zip, or a pickle


class WeightsError(RuntimeError):
    """Weights that are missing, damaged, or of another network. The message is for a person."""


def load_official(weights: str | Path, allow_download: bool = False) -> OfficialNetwork:
    """Load a checkpoint of ``transformers.PerceiverForOpticalFlow``, unchanged.

    Parameters
    ----------
    weights : a folder that ``save_pretrained`` wrote, a ``.safetensors`` file, a
        ``pytorch_model.bin``, or a Hugging Face id that is in the local cache (``HF_HOME``).
    allow_download : fetch a Hugging Face id that is not.

    Raises
    ------
    WeightsError
        When there are none, they are damaged, or they are of another network.
    """
    path = weights_file(find(weights, allow_download))
    tensors = read_tensors(path)
    try:
        config = official_config(path.parent / CONFIG, tensors)
    except ValueError as error:
        raise WeightsError(f'{path.parent / CONFIG}: {error}: this is not the configuration of a '
                           'Perceiver IO optical-flow checkpoint') from None
    with torch.device('meta'):
        network = OfficialNetwork(config)
    assign(network, tensors, path, transformers_name)
    network.positions = Positions(*config.train_size)
    return network.eval()


def load_lite(path: str | Path) -> LitePerceiver:
    """Load a safetensors file that `save_lite` wrote. WeightsError as in `load_official`."""
    path = weights_file(Path(path))
    if not path.is_file():
        raise WeightsError(f'{path}: no such file: the lite weights are missing')
    if variant_of(path) != 'lite':
        raise WeightsError(f'{path}: not a file of the lite variant: its metadata lacks '
                           '"variant": "lite"')
    try:
        values = json.loads(metadata(path).get('config', ''))
        network = LitePerceiver(LiteConfig(**values))
    except (ValueError, TypeError, RuntimeError) as error:
        raise WeightsError(f'{path}: its configuration is not one of the lite variant: {error}'
                           ) from None
    assign(network, read_tensors(path), path)
    return network.eval()


def save_lite(network: LitePerceiver, path: str | Path) -> None:
    """Write weights and configuration of a lite network, atomically."""
    from safetensors.torch import save

    path = Path(path)
    part = path.with_name(path.name + '.part')
    tensors = {name: value.detach().cpu().contiguous()
               for name, value in network.state_dict().items()}
    try:
        part.write_bytes(save(tensors, metadata={
            'variant': 'lite', 'config': json.dumps(asdict(network.config))}))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def variant_of(path: str | Path) -> str:
    """Tell which network the weights at a path are for: 'lite' or 'official'."""
    path = weights_file(Path(path))
    lite = path.suffix == '.safetensors' and path.is_file() \
        and metadata(path).get('variant') == 'lite'
    return 'lite' if lite else 'official'


def find(weights: str | Path, allow_download: bool = False) -> Path:
    """Path of weights, or of a Hugging Face id's folder in the local cache."""
    path = Path(weights).expanduser()
    if path.exists():
        return path
    name = str(weights)
    if isinstance(weights, Path) or name.count('/') != 1 or name[0] in '/.~' \
            or path.suffix in ('.safetensors', '.bin', '.pt', '.pth'):
        raise WeightsError(f'{name}: no such file or folder, nor is it lite, official, dis or a '
                           'Hugging Face id (OWNER/NAME)')
    return cached(name) or downloaded(name, allow_download)


def cached(name: str) -> Path | None:
    """Folder of a Hugging Face id in the local cache, if its weights are there."""
    hub = import_hub(name)
    for file in FILES:
        try:
            folder = Path(hub.snapshot_download(name, allow_patterns=[CONFIG, file],
                                                local_files_only=True))
        except (OSError, ValueError):
            continue
        if (folder / file).is_file():
            return folder
    return None


def downloaded(name: str, allowed: bool = True, force: bool = False) -> Path:
    """Fetch a Hugging Face id into the local cache, even where it is there if forced: folder."""
    hub = import_hub(name)
    cache = hub.constants.HF_HUB_CACHE
    if not allowed:
        raise WeightsError(
            f'{name}: neither a path nor in the local cache ({cache}); run "perceiver_flow '
            f'fetch_weights --model {name}" where there is a network, or set allow_download')
    try:
        files = hub.HfApi().model_info(name, timeout=10).siblings
        there = [file.rfilename for file in files]
        weights = next((file for file in FILES if file in there), None)
        if weights is None:
            raise WeightsError(f'{name}: this repository has neither {" nor ".join(FILES)}')
        return Path(hub.snapshot_download(name, allow_patterns=[CONFIG, weights],
                                          force_download=force))
    except WeightsError:
        raise
    except Exception as error:          # of many kinds: no network, no such id, no access, no room
        raise WeightsError(f'{name}: cannot be fetched from {hub.constants.ENDPOINT} into {cache} '
                           f'(no network? no such id?): {one_line(error)}') from error


def import_hub(name: str) -> Any:
    """Import huggingface_hub: only who names an id needs it."""
    try:
        import huggingface_hub
        import huggingface_hub.constants
    except ImportError:
        raise WeightsError(f'{name}: no such path, and to look for it in the Hugging Face cache '
                           'takes the package huggingface_hub (pip install huggingface_hub)'
                           ) from None
    return huggingface_hub


def weights_file(path: Path) -> Path:
    """Tell which file of a folder holds the weights; a file is itself."""
    if not path.is_dir():
        return path
    for name in (*FILES, LITE):
        if (path / name).is_file():
            return path / name
    raise WeightsError(f'{path}: this folder has neither {" nor ".join(FILES)}')


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a .safetensors or .bin file, on the CPU."""
    if path.suffix == '.safetensors':
        from safetensors import SafetensorError
        from safetensors.torch import load_file
        try:
            return load_file(path)
        except SafetensorError as error:
            raise WeightsError(f'{path}: truncated or not a safetensors file: {error}') from None
    with path.open('rb') as file:
        if not file.read(2).startswith(PYTORCH):
            raise WeightsError(f'{path}: truncated or not a file of weights: expected '
                               '.safetensors, or a pytorch_model.bin')
    if tuple(int(n) for n in torch.__version__.split('.')[:2]) < SAFE:
        raise WeightsError(f'{path}: refused: PyTorch {torch.__version__} could run code that '
                           'such a file holds (CVE-2025-32434, CVE-2026-24747); give a '
                           '.safetensors file, or install PyTorch 2.10 or newer')
    try:
        tensors = torch.load(path, map_location='cpu', weights_only=True)
    except UnpicklingError:
        raise WeightsError(f'{path}: refused: it holds more than plain tensors, and loading it '
                           'could run code (or it is damaged); convert it to safetensors where '
                           'it is trusted') from None
    except OSError:
        raise
    except Exception as error:          # whatever a damaged pickle leads to
        raise WeightsError(f'{path}: truncated or not a PyTorch file: {one_line(error)}') from None
    if not isinstance(tensors, dict) or not all(map(torch.is_tensor, tensors.values())):
        raise WeightsError(f'{path}: expected a dictionary of tensors (a state dict)')
    return tensors


def metadata(path: Path) -> dict[str, str]:
    """Metadata of a safetensors file."""
    from safetensors import safe_open, SafetensorError
    try:
        with safe_open(path, 'pt') as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise WeightsError(f'{path}: truncated or not a safetensors file: {error}') from None


def official_config(path: Path, tensors: dict[str, Tensor]) -> OfficialConfig:
    """Take the configuration from config.json where there is one, the rest from the tensors."""
    shapes = {}
    latents = tensors.get(transformers_name('latents'))
    if latents is not None and latents.ndim == 2:
        shapes['num_latents'], shapes['d_latents'] = latents.shape
    layers = {name.split('.')[3] for name in tensors
              if name.startswith('perceiver.encoder.self_attends.')}
    if layers:
        shapes['num_self_attends_per_block'] = len(layers)
    given = json.loads(path.read_text()) if path.is_file() else {}
    if not isinstance(given, dict):
        raise ValueError('expected a JSON object')
    for name, value in shapes.items():
        if given.get(name, value) != value:
            raise ValueError(f'{name} is {given[name]!r}, but the weights have {value}')
    return OfficialConfig.from_dict(shapes | given)


def transformers_name(name: str) -> str:
    """Name in a transformers checkpoint of a parameter of `OfficialNetwork`."""
    for ours, theirs in (('content.', 'input_preprocessor.conv_after_patches.'),
                         ('latents', 'embeddings.latents'),
                         ('decoder.cross_attention.', 'decoder.decoder.decoding_cross_attention.'),
                         ('decoder.final_layer.', 'decoder.decoder.final_layer.')):
        if name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    before, attention, after = name.partition('.attention.')
    if after.startswith('output.'):
        after = after.replace('output.', 'output.dense.')
    elif attention:
        after = 'self.' + after
    return f'perceiver.{before}{attention}{after}'


def assign(network: nn.Module, tensors: dict[str, Tensor], path: Path,
           rename: Callable[[str], str] = str) -> None:
    """Give a network its tensors, in float32. WeightsError when some are missing or misshapen."""
    wanted = {name: (rename(name), value.shape) for name, value in network.state_dict().items()}
    missing = [name for name, _ in wanted.values() if name not in tensors]
    if missing:
        raise WeightsError(f'{path}: {len(missing)} of {len(wanted)} tensors are missing, the '
                           f'first is {missing[0]!r}: these are the weights of another network')
    for name, shape in wanted.values():
        if tensors[name].shape != shape:
            raise WeightsError(f'{path}: {name!r} has shape {list(tensors[name].shape)}, '
                               f'expected {list(shape)}: these are the weights of another network')
    network.load_state_dict({name: tensors[theirs].to(torch.float32, copy=True)
                             for name, (theirs, _) in wanted.items()}, assign=True)
    network.requires_grad_(False)


def one_line(error: Exception) -> str:
    """Say what an exception says, shortly."""
    return ' '.join(str(error).split())[:300] or type(error).__name__
