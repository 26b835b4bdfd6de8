"""What can not be served is refused before an engine exists, in one sentence."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from neuroscope_vllm.cli.bench_shapes import write_random_sae
from neuroscope_vllm.core.calibration import Calibration
from tests.support import models
from tests.support.served import SMALL, environment, start_vllm

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def refuse(tiny_llama: Path) -> Any:
    """Calls vllm.LLM in this process; the refusal comes before any engine process starts."""
    from vllm import LLM

    from neuroscope_vllm.core.errors import NeuroscopeError

    def call(config: dict[str, Any], match: str, model: Path = tiny_llama, **llm: Any) -> None:
        config = {"hub": "ipc:///nowhere", **config}
        with pytest.raises(NeuroscopeError, match=match) as raised:
            LLM(str(model), dtype="float32", additional_config={"neuroscope": config}, **llm)
        sentence = str(raised.value)
        assert "\n" not in sentence
        assert sentence.endswith((".", "?"))

    return call


def test_missing_sae(refuse: Any) -> None:
    refuse({"sae": "/no/such/sae"}, "/no/such/sae")


def test_sae_of_another_model_size(refuse: Any, tmp_path: Path) -> None:
    wide = models.write_saelens_sae(tmp_path / "wide", d_model=128, width=256, layer=20)
    refuse({"sae": str(wide)}, "size 128 .* size 64")


def test_gemma_scope_by_name(refuse: Any, tmp_path: Path) -> None:
    """Nothing can be fetched here; that the right address is asked for shows in the refusal."""
    model = models.write_tiny_model(tmp_path / "gemma-2-2b-it", "gemma2")
    refuse({"sae": "gemma-scope"}, "no layer is given", model=model)
    refuse({"sae": "gemma-scope", "layer": 20}, "gemma-scope has no SAE of .*llama")
    refuse({"sae": "gemma-scope", "layer": 26}, "no SAE of width 16k on layer 26", model=model)
    address = "google/gemma-scope-2b-pt-res.*layer_20/width_16k/average_l0_71"
    refuse({"sae": "gemma-scope", "layer": 20}, address, model=model)


def test_another_hook_point(refuse: Any, tmp_path: Path) -> None:
    sae = models.write_saelens_sae(tmp_path / "mlp", d_model=64, width=256, layer=20)
    config = sae / "cfg.json"
    config.write_text(config.read_text().replace("hook_resid_post", "hook_mlp_out"))
    refuse({"sae": str(sae)}, "hook_mlp_out")


def test_layer_out_of_range(refuse: Any, tmp_path: Path) -> None:
    sae = models.write_saelens_sae(tmp_path / "sae", d_model=64, width=256, layer=30)
    refuse({"sae": str(sae)}, "layer 30 does not exist.*26 layers")


def test_unsupported_architecture(refuse: Any, tiny_sae: Path, tmp_path: Path) -> None:
    model = models.write_tiny_model(tmp_path / "qwen2", "qwen2")
    refuse({"sae": str(tiny_sae)}, "Qwen2ForCausalLM is not a supported", model=model)


def test_unknown_key(refuse: Any, tiny_sae: Path) -> None:
    refuse({"sae": str(tiny_sae), "topk": 3}, "unknown key 'topk'; did you mean top_k")


@pytest.mark.parametrize(
    ("text", "match"),
    [("sae: [unclosed", "not valid YAML"), (None, "can not be read"), ("- a\n", "name: value")],
)
def test_bad_yaml(refuse: Any, tmp_path: Path, text: str | None, match: str) -> None:
    path = tmp_path / "neuroscope.yaml"
    if text is not None:
        path.write_text(text)
    refuse({"config": str(path)}, match)


def test_nan_in_the_sae(refuse: Any, tmp_path: Path) -> None:
    folder = write_random_sae(tmp_path / "layer_20", 64, 256)
    arrays = dict(np.load(folder / "params.npz"))
    arrays["W_enc"][3, 5] = np.nan
    np.savez(folder / "params.npz", **arrays)
    refuse({"sae": str(folder), "layer": 20}, "NaN")


def test_pickle_in_the_sae(refuse: Any, tmp_path: Path) -> None:
    folder = write_random_sae(tmp_path / "layer_20", 64, 256)
    arrays = dict(np.load(folder / "params.npz"))
    np.savez(folder / "params.npz", **{**arrays, "b_enc": np.array([{"a": 1}], dtype=object)})
    refuse({"sae": str(folder), "layer": 20}, "pickle")


def test_presets_where_kv_blocks_are_found_by_tokens(
    refuse: Any, tiny_sae: Path, tmp_path: Path
) -> None:
    from vllm.config import KVTransferConfig

    operator = tmp_path / "steering.yaml"
    operator.write_text("presets: {calm: [{op: add, feature: 3, value: 1}]}")
    transfer = KVTransferConfig(kv_connector="ExampleConnector", kv_role="kv_both")
    refuse(
        {"sae": str(tiny_sae), "steering": str(operator)},
        "steering file: steer: .* through ExampleConnector, .* serve without --kv-transfer-config",
        kv_transfer_config=transfer,
    )


def test_offline_engine_without_a_hub(refuse: Any, tiny_sae: Path) -> None:
    refuse({"sae": str(tiny_sae), "hub": None}, "no hub")


def test_vllm_serve_exits_with_the_sentence(tiny_llama: Path, tmp_path: Path) -> None:
    """Through the public door: no traceback, no engine, a non-zero exit."""
    server = start_vllm(
        tiny_llama,
        tmp_path / "log",
        neuroscope={"sae": "/no/such/sae"},
        vllm_flags=SMALL,
    )
    assert server.process.wait(120) == 1
    log = server.log.read_text()
    # Some versions write their process's name in front.
    sentence = re.sub(r"^\(APIServer pid=\d+\) ", "", log.splitlines()[-1])
    assert sentence.startswith("neuroscope: ")
    assert "/no/such/sae" in sentence
    assert "Traceback" not in log
    assert "EngineCore" not in log


def test_neuroscope_serve_says_it_before_starting_vllm(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "neuroscope_vllm.cli", "serve", "m", "--sae", "x"]
    env = environment({"NEUROSCOPE_TOPK": "3"})
    result = subprocess.run(words, env=env, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "NEUROSCOPE_TOPK" in result.stderr


def test_two_saes_on_one_layer(refuse: Any, tiny_sae: Path) -> None:
    refuse({"sae": [str(tiny_sae), str(tiny_sae)]}, "two SAEs read layer 20")


def test_ranking_without_its_calibration(refuse: Any, tiny_sae: Path) -> None:
    refuse({"sae": str(tiny_sae), "ranking": "zscore"}, "zscore needs a calibration")


def test_calibration_of_another_width(refuse: Any, tiny_sae: Path, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    Calibration.empty(256).save(path)
    refuse({"sae": str(tiny_sae), "calibration": str(path)}, "256 features .* 512")


def test_calibration_of_another_input(refuse: Any, tiny_sae: Path, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    Calibration.empty(512, sae_input="rms").save(path)
    why = "was made with sae_input rms, but sae_input is raw"
    refuse({"sae": str(tiny_sae), "calibration": str(path)}, why)


def test_calibration_of_other_weights(refuse: Any, tiny_sae: Path, tmp_path: Path) -> None:
    path = tmp_path / "calibration.safetensors"
    calibration = Calibration.empty(512, sae_digest="0123456789abcdef")
    calibration.tokens = 1
    calibration.save(path)
    refuse({"sae": str(tiny_sae), "calibration": str(path)}, "was made with other weights than")
