"""``dist-layerlr audit`` on scripts that know nothing of it: what it says is read off the scripts
themselves, and their training, output and exit status stay their own."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import accelerate
import pytest
import trl

from dist_layerlr.audit.run import audit
from dist_layerlr.errors import ConfigError
from tests.support.extras import needs_families
from tests.support.jobs import BIN, free_port

SCRIPTS = Path(__file__).resolve().parents[1] / "support" / "audited"
SEQUENTIAL = {f"{i}.{leaf}" for i in (0, 1, 3) for leaf in ("weight", "bias")}
"""The parameters of the scripts' small nn.Sequential: a linear layer, a norm, a linear layer."""


class Report:
    """What one audit said."""

    def __init__(self, folder: Path, *command: str, ranks: int = 1, **more: Any):
        words = [sys.executable]
        if ranks > 1:
            port = f"--master_port={free_port()}"
            words = [str(BIN / "torchrun"), f"--nproc_per_node={ranks}", port]
        file = folder / "audit.json"
        self.text, self.status = audit([*words, *command], output=str(file), **more)
        self.json = json.loads(file.read_text()) if file.exists() else {}
        self.rows: dict[str, Any] = self.json.get("parameters", {})

    def names(self, kind: str) -> set[str]:
        """Names that findings of a kind list."""
        found = [f["names"] for f in self.json["findings"] if f["kind"] == kind]
        return {name for names in found for name in names}

    @property
    def kinds(self) -> set[str]:
        return {finding["kind"] for finding in self.json["findings"]}

    def told(self, kind: str) -> str:
        return " ".join(f["text"] for f in self.json["findings"] if f["kind"] == kind)


def script(name: str, *arguments: str) -> tuple[str, ...]:
    return str(SCRIPTS / f"{name}.py"), *arguments


def test_the_trainer_of_transformers_decays_neither_norms_nor_biases(tmp_path: Path):
    found = Report(tmp_path, *script("hf_trainer", str(tmp_path)))
    assert (found.status, found.kinds) == (0, set())
    assert len(found.rows) == 29
    for name, row in found.rows.items():
        spared = name.endswith(".bias") or "norm" in name
        assert row["weight_decay"] == (0.0 if spared else 0.1), name
        # Warmup ends after the first step, at which nothing moves; the second has the full rate.
        assert (row["lr"], row["algorithm"]) == (1e-3, "AdamW"), name
        assert row["observed"] == pytest.approx(1e-3, rel=0.02), name
        assert row["state"] == {"exp_avg": "float32", "exp_avg_sq": "float32"}


def test_trls_own_script_trains_a_lora_and_nothing_else(tmp_path: Path):
    model, data = tmp_path / "model", tmp_path / "data"
    _tiny_language_model(model)
    data.mkdir()
    rows = [json.dumps({"text": f"a b {word} d"}) for word in ("c", "d", "a", "b")]
    (data / "train.jsonl").write_text("\n".join(rows))
    found = Report(
        tmp_path,
        str(Path(trl.__file__).parent / "scripts" / "sft.py"),
        *("--model_name_or_path", str(model), "--dataset_name", str(data)),
        *("--use_peft", "--lora_r", "2", "--lora_target_modules", "q_proj", "v_proj"),
        *("--output_dir", str(tmp_path / "out"), "--max_steps", "3", "--learning_rate", "1e-3"),
        *("--lr_scheduler_type", "constant", "--report_to", "none", "--save_strategy", "no"),
        *("--use_cpu", "--bf16", "False", "--per_device_train_batch_size", "2"),
        *("--gradient_checkpointing", "False", "--disable_tqdm", "True"),
    )
    assert (found.status, found.names("dead")) == (0, set())
    factors = {f"{part}.lora_{side}.default.weight" for part in "qv" for side in "AB"}
    expected = {
        f"model.layers.{layer}.self_attn.{factor.replace('.', '_proj.', 1)}"
        for layer in range(2)
        for factor in factors
    }
    assert found.rows.keys() == expected
    assert {row["lr"] for row in found.rows.values()} == {1e-3}
    assert all(row["moved"] for row in found.rows.values())
    # At the first step B is 0, so that A has a gradient of zeros: it moves from the second on.
    assert all(row["observed"] == pytest.approx(1e-3, rel=0.02) for row in found.rows.values())
    assert set(found.json["frozen"]).isdisjoint(expected) and len(found.json["frozen"]) > 10


def _tiny_language_model(folder: Path) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = {word: i for i, word in enumerate(["<pad>", "<eos>", "<unk>", "a", "b", "c", "d"])}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    ).save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def test_a_lightning_module_is_compared_with_a_plan(tmp_path: Path):
    def row(lr: float) -> dict[str, Any]:
        place = {"stack": None, "block": None, "component": "default"}
        return {"lr": lr, "weight_decay": 0.0, "numel": 0, **place}

    sizes = {"0.weight": 128, "0.bias": 16, "1.weight": 16, "1.bias": 16}
    rows = {f"backbone.{name}": {**row(1e-4), "numel": n} for name, n in sizes.items()}
    rows |= {"head.weight": {**row(1e-2), "numel": 48}, "head.bias": {**row(5e-3), "numel": 3}}
    plan = tmp_path / "plan.json"
    plan.write_text(json.dumps({"digest": "by hand", "parameters": rows}))
    found = Report(tmp_path, *script("lightning_module", str(tmp_path)), plan=str(plan))
    assert (found.status, found.kinds) == (1, {"plan"})
    assert found.told("plan") == "outside.default: lr 0.005 -> 0.01 (x2)".replace(
        "outside.default", "head.bias"
    )
    assert {name: one["lr"] for name, one in found.rows.items()} == {
        **{f"backbone.{name}": 1e-4 for name in sizes},
        **dict.fromkeys(("head.weight", "head.bias"), 1e-2),
    }
    assert set(found.json["frozen"]) == {"unused.weight", "unused.bias"}


@needs_families
@pytest.mark.parametrize("schedule", ["timm", "torch"])
def test_timms_lr_scale_is_read_by_timms_schedule_only(schedule: str, tmp_path: Path):
    import timm
    from timm.optim import param_groups_layer_decay

    found = Report(tmp_path, *script("timm_layer_decay", schedule))
    model = timm.create_model(
        "vit_tiny_patch16_224", img_size=32, embed_dim=24, depth=3, num_heads=2, num_classes=4
    )
    names = {id(param): name for name, param in model.named_parameters()}
    groups = param_groups_layer_decay(model, 0.05, model.no_weight_decay(), layer_decay=0.5)
    scaled = schedule == "timm"
    for group in groups:
        for param in group["params"]:
            row = found.rows[names[id(param)]]
            scale = group["lr_scale"] if scaled else 1.0
            assert row["lr"] == pytest.approx(1e-3 * scale, rel=1e-6), names[id(param)]
            assert row["weight_decay"] == group["weight_decay"]
    assert found.rows.keys() == set(names.values())
    assert (found.status, found.kinds) == ((0, set()) if scaled else (1, {"unread"}))


def test_accelerates_loop_on_two_ranks_steps_the_schedule_twice(tmp_path: Path):
    found = Report(tmp_path, *script("accelerate_loop"), ranks=2)
    assert found.json["models"] == {"Sequential": "ddp"}
    assert (found.status, found.json["ranks"], found.rows.keys()) == (0, 2, SEQUENTIAL)
    for name, row in found.rows.items():
        assert row["lr"] == (1e-3 if name.startswith("3.") else 1e-4), name
        assert (row["elements"], row["holders"]) == (row["shape"][0] * (row["shape"] + [1])[1], 2)
    assert found.names("decay") == SEQUENTIAL - {"0.weight", "3.weight"}
    assert "LinearLR advances 2 times per optimizer step" in found.told("schedule")
    assert found.kinds == {"decay", "schedule"}


def test_deepspeeds_warmup_gives_all_groups_one_rate(tmp_path: Path):
    found = Report(tmp_path, *script("deepspeed_warmup", "2", "warmup"), ranks=2)
    assert found.json["models"] == {"Sequential": "zero 2"}
    assert (found.status, found.rows.keys()) == (1, SEQUENTIAL)
    # Linear warmup to 1e-3 over two steps: the first step at a rate is at half of it.
    assert {row["lr"] for row in found.rows.values()} == {5e-4}
    assert found.kinds == {"flattened"}
    assert "0.0001 / 0.01 were given, all train at 0.0005" in found.told("flattened")
    assert all(row["obeys"] for row in found.rows.values())


@pytest.mark.full
def test_deepspeed_without_a_schedule_keeps_its_clients_rates_at_stage_3(tmp_path: Path):
    found = Report(tmp_path, *script("deepspeed_warmup", "3", "none"), ranks=2)
    assert (found.status, found.kinds, found.rows.keys()) == (0, set(), SEQUENTIAL)
    for name, row in found.rows.items():
        assert row["lr"] == (1e-2 if name.startswith("3.") else 1e-4)


@pytest.mark.parametrize(
    ("kind", "sharder"),
    [("fsdp1", "fsdp1_flat"), pytest.param("fsdp2", "fsdp2", marks=pytest.mark.full)],
)
def test_an_optimizer_that_is_older_than_the_shards_trains_nothing(
    kind: str, sharder: str, tmp_path: Path
):
    found = Report(tmp_path, *script("fsdp_too_early", kind), ranks=2)
    assert found.json["models"] == {"Sequential": sharder}
    assert (found.status, found.rows) == (1, {})
    names = {f"{i}.{leaf}" for i in range(3) for leaf in ("weight", "bias")}
    assert found.names("dead") == names
    assert "6 tensors in SGD belong to no model" in found.told("stale")


@pytest.fixture(scope="module")
def alone() -> subprocess.CompletedProcess[str]:
    """The planted script without an audit; what cannot be looked at trains the same."""
    command = [sys.executable, *script("planted", "readable")]
    return subprocess.run(command, capture_output=True, text=True)


def test_planted_faults_are_found_and_the_script_stays_as_it_was(
    tmp_path: Path, alone: subprocess.CompletedProcess[str], capfd
):
    found = Report(tmp_path, *script("planted", "readable"))
    # The last digit of the trained weights, what was printed, and the status.
    assert capfd.readouterr().out == alone.stdout
    assert found.status == alone.returncode == found.json["script_status"] == 7
    assert found.names("dead") == {"forgotten.weight"}
    assert found.names("twice") == {"twice.weight"}
    assert found.names("unmoved") == {"rounded.weight"}
    assert found.names("no gradient") == {"unreached.weight"}
    assert "0.001 / 0.0001 were given" in found.told("flattened")
    assert found.rows["rounded.weight"]["state"]["exp_avg"] == "bfloat16"
    assert "FAULT (dead): 1 name trainable, in no optimizer: forgotten.weight" in found.text


def test_an_audit_that_fails_says_so_and_changes_nothing(
    tmp_path: Path, alone: subprocess.CompletedProcess[str], capfd
):
    found = Report(tmp_path, *script("planted", "unreadable"))
    assert capfd.readouterr().out == alone.stdout
    assert found.status == alone.returncode == 7
    assert "nobody may look" in found.told("audit")


@pytest.mark.full
def test_accelerates_own_test_of_an_installation_trains_ten_models_without_a_fault(tmp_path: Path):
    path = Path(accelerate.__file__).parent / "test_utils" / "scripts" / "test_script.py"
    found = Report(tmp_path, str(path))
    assert (found.status, found.kinds) == (0, set())
    assert {row["lr"] for row in found.rows.values()} == {0.1}
    assert {name.rpartition(".")[2] for name in found.rows} == {"a", "b"}


def test_a_command_that_trains_nothing_is_status_4_and_a_sitecustomize_still_runs(
    tmp_path: Path, capfd, monkeypatch
):
    (tmp_path / "sitecustomize.py").write_text("print('the one of this machine')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=":")
    text, status = audit([sys.executable, "-c", "print('done')"])
    assert (status, capfd.readouterr().out) == (4, "the one of this machine\ndone\n")
    assert "no optimizer step was seen" in text


def test_where_nothing_was_seen_an_earlier_report_does_not_stay(tmp_path: Path):
    file = tmp_path / "audit.json"
    file.write_text('{"findings": ["of another script"]}')
    text, status = audit(["false"], output=str(file))
    assert status == 1 and "the command ended with status 1, and no optimizer step" in text
    found = json.loads(file.read_text())
    assert (found["ranks"], found["findings"], found["script_status"]) == (0, [], 1)


def test_bad_options_are_refused_before_the_command_runs(tmp_path: Path):
    ran = tmp_path / "ran"
    for more, says in (
        ({"steps": 0}, "Invalid --steps=0: must be an integer >= 1"),
        ({"output": str(tmp_path)}, "it is a folder. Name a file in it"),
        ({"output": str(tmp_path / "no" / "a.json")}, "its folder does not exist"),
    ):
        with pytest.raises(ConfigError, match=says):
            audit(["touch", str(ran)], **more)
    assert not ran.exists()
