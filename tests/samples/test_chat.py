"""Test conversations as samples: JSON lines with messages, written out by the chat template of the tokenizer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inputs import BERT, an_input
from texts import WORDS, a_tokenizer

from comq_onnx.errors import SamplesError
from comq_onnx.options.samples import SampleOptions
from comq_onnx.samples.chat import write_out
from comq_onnx.samples.load import load_samples
from comq_onnx.samples.samples import Clues

TEMPLATE = """{{ bos_token }}
{% for message in messages %}
    {% if message.role == "sun" %}{{ raise_exception("no sun here") }}{% endif %}
 {{ message.role }} {{ message.content }}
{% endfor %}
{{ eos_token }}"""
CONFIG: dict[str, Any] = {"chat_template": TEMPLATE, "bos_token": {"content": "warm"}, "eos_token": "small"}
CHAT = [{"role": "fox", "content": "over the lazy dog"}, {"role": "cats", "content": "sleep"}]
SAID = "warm fox over the lazy dog cats sleep small"


def ids(text: str) -> list[int]:
    """Return the tokens of words."""
    return [4 + WORDS.index(word) for word in text.split()]


def put(folder: Path, config: dict[str, Any] | None = CONFIG) -> Path:
    """Write a tokenizer and its configuration, and return the path of the tokenizer."""
    a_tokenizer().save(str(folder / "tokenizer.json"))
    if config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder / "tokenizer.json"


def load(folder: Path, *lines: dict[str, Any], inputs: Any = BERT, **options: Any) -> Any:
    """Load JSON lines beside a model."""
    (folder / "chat.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return load_samples(folder / "chat.jsonl", inputs, SampleOptions(**options), clues=Clues(folder))


@pytest.mark.parametrize("options", [{}, {"text_field": "messages"}])
def test_a_conversation_is_one_text_without_more_special_tokens(tmp_path: Path, options: dict[str, Any]) -> None:
    put(tmp_path)
    found = load(tmp_path, {"messages": CHAT}, {"messages": CHAT[:1], "source": "x"}, **options)
    np.testing.assert_array_equal(found.arrays["input_ids"][0], ids(SAID))
    assert found.arrays["input_ids"][1, :7].tolist() == ids("warm fox over the lazy dog small")
    assert any("chat template" in note for note in found.notes)


def test_another_field_may_hold_conversations_and_text_comes_first(tmp_path: Path) -> None:
    put(tmp_path)
    found = load(tmp_path, {"turns": CHAT, "messages": "x"}, text_field="turns")
    assert found.arrays["input_ids"][0].tolist() == ids(SAID)
    found = load(tmp_path, {"messages": CHAT, "text": "the fox"})
    assert found.arrays["input_ids"].tolist() == [[1, *ids("the fox"), 2]]


@pytest.mark.parametrize("where", ["list", "file"])
def test_templates_lie_in_a_list_or_a_file_of_their_own(tmp_path: Path, where: str) -> None:
    config = {**CONFIG, "chat_template": None}
    if where == "list":
        config["chat_template"] = [{"name": "tools", "template": ""}, {"name": "default", "template": TEMPLATE}]
    else:
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    assert write_out([CHAT, "as it is"], put(tmp_path, config)) == [write_out([CHAT], put(tmp_path))[0], "as it is"]


def test_a_template_writes_json_for_text_and_reaches_nothing_else(tmp_path: Path) -> None:
    tokenizer = put(tmp_path, {"chat_template": "{{ messages[0] | tojson }}"})
    assert write_out([[{"role": "a", "content": "<ü>"}]], tokenizer) == ['{"role": "a", "content": "<ü>"}']
    put(tmp_path, {"chat_template": "{{ messages.__class__.__mro__[1].__subclasses__() }}"})
    with pytest.raises(SamplesError, match="cannot write these messages"):
        write_out([CHAT], tokenizer)


@pytest.mark.parametrize(
    ("config", "lines", "said"),
    [
        (None, [{"messages": CHAT}], "conversations ('messages') need the chat template"),
        (CONFIG, [{"messages": [{"role": "sun", "content": ""}]}], "cannot write these messages (no sun here)"),
        ({"chat_template": "{% for"}, [{"messages": CHAT}], "cannot write these messages"),
        (CONFIG, [{"messages": []}], "line 1: no text in 'messages' (it has messages)"),
        (CONFIG, [{"messages": [{"role": "a"}]}], "line 1: no text in 'messages'"),
    ],
)
def test_what_cannot_be_written_out_is_told(
    tmp_path: Path, config: dict[str, Any] | None, lines: list[dict[str, Any]], said: str
) -> None:
    put(tmp_path, config)
    with pytest.raises(SamplesError) as error:
        load(tmp_path, *lines)
    assert said in str(error.value)


def test_a_configuration_that_is_no_json_and_a_model_of_strings_are_told(tmp_path: Path) -> None:
    with pytest.raises(SamplesError, match="by itself, without a chat template"):
        load(tmp_path, {"messages": CHAT}, inputs=[an_input(None, name="a", dtype=object)])
    put(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(SamplesError, match="cannot be read as JSON"):
        load(tmp_path, {"messages": CHAT})
