# SPDX-License-Identifier: Apache-2.0
"""Weights load from wherever they may lie, and each thing that can be wrong has its message."""

import hashlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
import json
import os
from pathlib import Path
import shutil
import subprocess
import sys
import threading

from perceiver_flow_ros.commands.benchmark import frame_pair, peaky_network
from perceiver_flow_ros.commands.main import main as command
from perceiver_flow_ros.flow.lite import PACKAGED
from perceiver_flow_ros.model.lite import LiteConfig, LitePerceiver
from perceiver_flow_ros.model.weights import (
    load_lite,
    load_official,
    read_tensors,
    save_lite,
    transformers_name,
    variant_of,
    WeightsError,
)
import pytest
from safetensors.torch import load_file, save_file
import torch

HEIGHT, WIDTH = 24, 40
SHA = '0123456789abcdef0123456789abcdef01234567'


@pytest.fixture(scope='module')
def network():
    return peaky_network(HEIGHT, WIDTH, num_latents=48, d_latents=64,
                         num_self_attends_per_block=2, num_self_attention_heads=4)


@pytest.fixture(scope='module')
def saved(network, tmp_path_factory):
    """Make a folder as save_pretrained writes it; with transformers, written by it."""
    folder = tmp_path_factory.mktemp('saved')
    try:
        from perceiver_flow_ros.commands.benchmark import transformers_peer
        transformers_peer(network).save_pretrained(folder)
    except ImportError:
        pytest.skip('needs transformers, to write what must be read')
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """Copy it, to be damaged."""
    return Path(shutil.copytree(saved, tmp_path / 'checkpoint'))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Give an empty Hugging Face cache, and no network."""
    import huggingface_hub.constants as constants
    monkeypatch.setattr(constants, 'HF_HUB_CACHE', str(tmp_path / 'hub'))
    monkeypatch.setattr(constants, 'HF_HUB_OFFLINE', True)
    return tmp_path / 'hub'


def flow(network):
    with torch.no_grad():
        return network(torch.from_numpy(frame_pair(HEIGHT, WIDTH))[None])


def put_into_cache(hub: Path, name: str, folder: Path) -> None:
    """Lay a folder out as the hub's cache does: blobs, snapshots that link to them, refs."""
    root = hub / ('models--' + name.replace('/', '--'))
    for part in ('blobs', 'refs', f'snapshots/{SHA}'):
        (root / part).mkdir(parents=True)
    (root / 'refs' / 'main').write_text(SHA)
    for file in folder.iterdir():
        digest = hashlib.sha256(file.read_bytes()).hexdigest()
        shutil.copy(file, root / 'blobs' / digest)
        (root / 'snapshots' / SHA / file.name).symlink_to(f'../../blobs/{digest}')


def bin_folder(folder: Path, contents: object, **options) -> Path:
    (folder / 'model.safetensors').unlink()
    torch.save(contents, folder / 'pytorch_model.bin', **options)
    return folder


def test_folder_file_and_bin(network, folder):
    expected = flow(network)
    assert torch.equal(flow(load_official(folder)), expected)
    assert torch.equal(flow(load_official(str(folder / 'model.safetensors'))), expected)
    bin_folder(folder, load_file(folder / 'model.safetensors'))
    assert torch.equal(flow(load_official(folder)), expected)
    assert torch.equal(flow(load_official(folder / 'pytorch_model.bin')), expected)


def test_half_precision_checkpoint_is_computed_in_float32(network, folder):
    tensors = load_file(folder / 'model.safetensors')
    save_file({name: value.half() for name, value in tensors.items()},
              folder / 'model.safetensors')
    loaded = load_official(folder)
    assert {weight.dtype for weight in loaded.parameters()} == {torch.float32}
    assert (flow(loaded) - flow(network)).norm() < 0.05 * flow(network).norm()


def test_without_config_the_tensors_tell(network, folder):
    """Heads and training size cannot be seen in tensors: the official ones are taken."""
    (folder / 'config.json').unlink()
    config = load_official(folder).config
    assert (config.num_latents, config.d_latents, config.num_self_attends_per_block) == (48, 64, 2)
    assert config.train_size == (368, 496) and config.num_self_attention_heads == 16


def test_hugging_face_cache(network, folder, cache):
    put_into_cache(cache, 'acme/flow', folder)
    assert torch.equal(flow(load_official('acme/flow')), flow(network))


def test_not_in_the_cache(cache):
    with pytest.raises(WeightsError, match=r'acme/flow: neither a path nor in the local cache '
                                           r'\(.*hub\); run "perceiver_flow fetch_weights'):
        load_official('acme/flow')
    with pytest.raises(WeightsError, match='acme/flow: cannot be fetched from https?://'):
        load_official('acme/flow', allow_download=True)


@pytest.mark.parametrize('name', ['/no/such/folder', './here', 'weights.safetensors', 'flow',
                                  'some/deep/path', '~/flow', 'models/flow.bin'])
def test_path_that_does_not_exist(name, cache):
    with pytest.raises(WeightsError, match='no such file or folder'):
        load_official(name)


def test_missing_keys(folder):
    tensors = load_file(folder / 'model.safetensors')
    for name in ('perceiver.embeddings.latents', 'perceiver.decoder.decoder.final_layer.bias'):
        save_file({key: value for key, value in tensors.items() if key != name},
                  folder / 'model.safetensors')
        with pytest.raises(WeightsError, match=f"1 of [0-9]+ tensors are missing.* '{name}'"):
            load_official(folder)


def test_wrong_shapes(folder):
    tensors = load_file(folder / 'model.safetensors')
    name = 'perceiver.input_preprocessor.conv_after_patches.weight'
    save_file(tensors | {name: torch.zeros(64, 27)}, folder / 'model.safetensors')
    with pytest.raises(WeightsError, match=rf"'{name}' has shape \[64, 27\], expected \[64, 54\]"):
        load_official(folder)


@pytest.mark.parametrize('change, message', [
    ({'num_latents': 50}, 'num_latents is 50, but the weights have 48'),
    ({'num_self_attends_per_block': 1}, 'num_self_attends_per_block is 1, but the weights have 2'),
    ({'num_self_attention_heads': 5}, 'not a multiple of num_self_attention_heads'),
    ({'train_size': [24]}, r'expected \[height, width\]'),
    ({'model_type': 'bert'}, "model_type is 'bert'"),
])
def test_config_that_does_not_fit(folder, change, message):
    path = folder / 'config.json'
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(WeightsError, match=f'config.json: .*{message}'):
        load_official(folder)


@pytest.mark.parametrize('text', ['', '{"num_latents":', '[]', '\0\1'])
def test_config_that_is_not_json(folder, text):
    (folder / 'config.json').write_text(text)
    with pytest.raises(WeightsError, match='config.json: '):
        load_official(folder)


@pytest.mark.parametrize('keep', [0, 5, 2000, 1_000_000])
def test_truncated_safetensors(folder, keep):
    path = folder / 'model.safetensors'
    path.write_bytes(path.read_bytes()[:keep])
    for load in (load_official, load_lite, variant_of):
        with pytest.raises(WeightsError, match='truncated or not a safetensors file'):
            load(path)


@pytest.mark.parametrize('zipped', [True, False])
@pytest.mark.parametrize('keep', [0, 100, 500_000])
def test_truncated_bin(folder, keep, zipped):
    bin_folder(folder, load_file(folder / 'model.safetensors'),
               _use_new_zipfile_serialization=zipped)
    path = folder / 'pytorch_model.bin'
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match='pytorch_model.bin: (truncated|refused)'):
        load_official(folder)


class Intruder:
    def __reduce__(self):
        return os.mkdir, ('intruded',)


@pytest.mark.parametrize('zipped', [True, False])
def test_pickle_that_runs_code_is_refused(folder, zipped, monkeypatch):
    monkeypatch.chdir(folder)
    bin_folder(folder, {'weights': Intruder()}, _use_new_zipfile_serialization=zipped)
    with pytest.raises(WeightsError, match='refused: it holds more than plain tensors'):
        load_official(folder)
    assert not (folder / 'intruded').exists()


def test_bin_is_refused_where_pytorch_would_run_its_code(folder, monkeypatch):
    bin_folder(folder, {})
    monkeypatch.setattr(torch, '__version__', '2.9.1+cpu')
    with pytest.raises(WeightsError, match='refused: PyTorch 2.9.1.cpu could run code'):
        load_official(folder)


def test_not_a_state_dict(folder):
    bin_folder(folder, {'step': 3, 'network': {}})
    with pytest.raises(WeightsError, match='expected a dictionary of tensors'):
        load_official(folder)


def test_folder_without_weights(tmp_path):
    with pytest.raises(WeightsError, match='neither model.safetensors nor pytorch_model.bin'):
        load_official(tmp_path)


def test_lite_round_trip(tmp_path, folder):
    torch.manual_seed(0)
    network = LitePerceiver(LiteConfig(latents=8, layers=1))
    path = tmp_path / 'lite.safetensors'
    save_lite(network, path)
    assert variant_of(path) == 'lite' and variant_of(folder) == 'official'
    assert variant_of(folder / 'model.safetensors') == 'official'
    assert [file.name for file in tmp_path.glob('lite*')] == ['lite.safetensors']
    assert variant_of(tmp_path) == 'lite'  # what `train` made
    loaded = load_lite(tmp_path)
    assert loaded.config == network.config and not loaded.training
    for name, value in network.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0)

    with pytest.raises(WeightsError, match='tensors are missing'):
        load_official(path)
    with pytest.raises(WeightsError, match='not a file of the lite variant'):
        load_lite(folder / 'model.safetensors')
    with pytest.raises(WeightsError, match='no such file'):
        load_lite(tmp_path / 'other.safetensors')
    save_file({'a': torch.zeros(1)}, path, {'variant': 'lite', 'config': '{"wings": 2}'})
    with pytest.raises(WeightsError, match='configuration.*wings'):
        load_lite(path)
    save_file({'a': torch.zeros(1)}, path, {'variant': 'lite', 'config': '{}'})
    with pytest.raises(WeightsError, match='tensors are missing'):
        load_lite(path)


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download takes."""

    root: Path

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        path = self.path.partition('?')[0]
        headers = {}
        if path == '/acme/flow/resolve/' + f'{SHA}/{Path(path).name}':
            data = (self.root / Path(path).name).read_bytes()
            headers = {'ETag': f'"{hashlib.sha256(data).hexdigest()}"', 'X-Repo-Commit': SHA}
        elif path.startswith('/api/models/acme/flow'):
            files = [{'type': 'file', 'path': file.name, 'rfilename': file.name,
                      'size': file.stat().st_size, 'oid': SHA} for file in self.root.iterdir()]
            data = json.dumps(files if '/tree/' in path else
                              {'id': 'acme/flow', 'sha': SHA, 'siblings': files}).encode()
        else:
            self.send_error(404)
            return
        self.send_response(200)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header('Content-Length', str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, *_):
        pass


def test_fetch_weights(folder, cache, monkeypatch, capsys):
    """From a hub into the cache; then the network is no longer needed."""
    import huggingface_hub.constants as constants
    (folder / 'pytorch_model.bin').write_bytes(b'not needed, so not fetched')
    (folder / 'README.md').write_text('not needed either')

    assert command(['fetch_weights', '--model', 'acme/flow']) == 2
    assert 'error: acme/flow: cannot be fetched' in capsys.readouterr().err.splitlines()[-1]

    server = ThreadingHTTPServer(('127.0.0.1', 0), type('', (Hub,), {'root': folder}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    hub = f'http://127.0.0.1:{server.server_port}'
    with monkeypatch.context() as online:
        online.setattr(constants, 'HF_HUB_OFFLINE', False)
        online.setattr(constants, 'ENDPOINT', hub)
        online.setattr(constants, 'HUGGINGFACE_CO_URL_TEMPLATE',
                       hub + '/{repo_id}/resolve/{revision}/{filename}')
        assert command(['fetch_weights', '--model', 'acme/flow']) == 0
    server.shutdown()
    server.server_close()
    snapshot = cache / 'models--acme--flow' / 'snapshots' / SHA
    assert f'575,854 parameters, fetched to {snapshot}' in capsys.readouterr().out
    assert sorted(file.name for file in snapshot.iterdir()) == ['config.json', 'model.safetensors']

    assert command(['fetch_weights', '--model', 'acme/flow', '--json']) == 0
    assert json.loads(capsys.readouterr().out)['fetched'] is False


def test_a_picture_is_no_file_of_weights(tmp_path):
    path = tmp_path / 'a.png'
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(100))
    with pytest.raises(WeightsError, match='a.png: truncated or not a file of weights: expected'):
        read_tensors(path)


def test_names_are_those_of_transformers(network, saved):
    names = {transformers_name(name) for name in network.state_dict()}
    assert names == set(load_file(saved / 'model.safetensors'))


def test_weights_do_not_hang_on_their_file(tmp_path):
    """A file that is rewritten in place while the network is used: mapped memory would be gone."""
    path = tmp_path / 'lite.safetensors'
    shutil.copy(PACKAGED, path)
    program = (
        'import os, sys; from perceiver_flow_ros.model.weights import load_lite\n'
        'network = load_lite(sys.argv[1]); os.truncate(sys.argv[1], 0)\n'
        'assert all(weight.isfinite().all() for weight in network.parameters())\n'
    )
    child = subprocess.run([sys.executable, '-c', program, str(path)], capture_output=True)
    assert child.returncode == 0, child.stderr.decode()
