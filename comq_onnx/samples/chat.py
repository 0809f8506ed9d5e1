"""Write conversations out as the text that a language model was trained on, by the chat template of its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from comq_onnx.errors import SamplesError
from comq_onnx.samples.model_folder import find_beside, parse_json

# the field of a JSON line that holds a conversation
MESSAGES = "messages"
CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"

# each message has a role and a content
Messages = Sequence[Mapping[str, Any]]


def is_conversation(value: Any) -> TypeGuard[Messages]:
    """Tell whether a value of a JSON line is a conversation: a list of messages with role and content."""
    return (
        isinstance(value, list)
        and len(value) > 0
        and all(isinstance(one, dict) and isinstance(one.get("role"), str) and "content" in one for one in value)
    )


def write_out(texts: Sequence[str | Messages], tokenizer: Path) -> list[str]:
    """Return texts, and conversations as texts by the chat template beside the tokenizer.

    tokenizer: the path of tokenizer.json

    Raises SamplesError where there are conversations and no template, or it fails.
    """
    if all(isinstance(text, str) for text in texts):
        return [str(text) for text in texts]
    path, template, tokens = _read_template(tokenizer.parent)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    try:
        compiled = environment.from_string(template)
        return [
            text if isinstance(text, str) else compiled.render(messages=text, add_generation_prompt=False, **tokens)
            for text in texts
        ]
    except (TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
        raise SamplesError(f"{path}: its chat template cannot write these messages ({error})") from error


def _read_template(folder: Path) -> tuple[Path, str, dict[str, str]]:
    """Return the file of a chat template, the template, and the texts of special tokens by their names."""
    found = find_beside(folder, (CONFIG,))
    config: Any = {}
    try:
        config = parse_json(found[0].read_text(encoding="utf-8")) if found else {}
    except (OSError, ValueError) as error:
        raise SamplesError(f"{found[0]}: cannot be read as JSON ({error})") from error
    config = config if isinstance(config, dict) else {}
    tokens = {name: _text_of(value) for name, value in config.items() if name.endswith("_token")}
    template = config.get("chat_template")
    if isinstance(template, list):
        # several, by name
        named = {one.get("name"): one.get("template") for one in template if isinstance(one, dict)}
        template = named.get("default")
    if isinstance(template, str):
        return found[0], template, tokens
    for path in find_beside(folder, (TEMPLATE,)):
        return path, path.read_text(encoding="utf-8"), tokens
    raise SamplesError(
        f"{folder}: conversations ({MESSAGES!r}) need the chat template of the tokenizer: put its {CONFIG} or "
        f"{TEMPLATE} beside tokenizer.json, or give lines with a text"
    )


def _text_of(token: Any) -> str:
    """Return the text of a special token, which a configuration has as it is or with what belongs to it."""
    return str(token.get("content", "")) if isinstance(token, dict) else str(token or "")


def _to_json(value: Any, **how: Any) -> str:
    """Write a value as JSON; unlike jinja2's own filter, for text and not for HTML."""
    return json.dumps(value, ensure_ascii=False, **how)


def _refuse(message: str) -> None:
    """Raise what a template says is wrong with the messages."""
    raise TemplateError(message)
