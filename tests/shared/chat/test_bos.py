"""BOS: what a tokenizer puts before every text, each rendered conversation begins with, once."""

from pathlib import Path
from typing import Any, cast

import pytest
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

from stages.merge.merge import make_standalone
from stages.prepare.loss_mask import Example, ExampleEncoder, TrainOn
from stages.shared.chat import templates
from stages.shared.chat.conversation import Conversation
from stages.shared.chat.encode import Encoder
from stages.shared.chat.templates import Template
from stages.shared.chat.tokenizer import load_tokenizer
from stages.shared.core import files
from stages.shared.core.errors import UserError
from tests import vocabularies
from tests.conversations import PLAIN, assistant, encode, system, user

OWN = (  # as many fine-tuned models carry it: without BOS
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] + eos_token }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
TEMPLATES = ("chatml", "guanaco", "llama2", "tokenizer")
CONVERSATIONS = (
    *PLAIN.values(),
    [system("the"), user("two"), assistant("dos"), user("is"), assistant("it")],
)


def merge(tokenizer_folder: Path, template: Template, folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a merged model."""
    config = LlamaConfig(vocab_size=400, dtype="float32")
    for model in (folder, folder / "model"):
        config.save_pretrained(model)
    make_standalone(folder, folder / "model", tokenizer_folder, template.format())
    return AutoTokenizer.from_pretrained(folder)


def made(family: str, template: str, own: str = OWN) -> tuple[PreTrainedTokenizerFast, Template]:
    tokenizer = vocabularies.FAMILIES[family][0]()
    tokenizer.chat_template = own
    return tokenizer, templates.make(template, tokenizer)


def begins_once(ids: list[int], tokenizer: PreTrainedTokenizerFast, bos: str) -> bool:
    first = tokenizer.encode(bos, add_special_tokens=False)
    count = len(first)
    return ids[:count] == first and (not count or ids[count : 2 * count] != first)


@pytest.mark.parametrize("template_name", TEMPLATES)
@pytest.mark.parametrize("family", vocabularies.FAMILIES)
def test_bos_is_there_once_in_training_and_prompts(family: str, template_name: str) -> None:
    bos = vocabularies.FAMILIES[family][1]
    tokenizer, template = made(family, template_name)
    assert tokenizer("two").input_ids[: len(tokenizer.encode(bos, add_special_tokens=False))] == (
        tokenizer.encode(bos, add_special_tokens=False)
    )
    encoder = ExampleEncoder(tokenizer, template, "assistant", 512)
    for messages in CONVERSATIONS:
        [one] = encode(encoder, [messages])
        assert isinstance(one, Example)
        assert one.text.startswith(bos)
        prompt = Encoder(tokenizer, template).encode_prompt(Conversation(messages))
        for ids in (one.input_ids.tolist(), prompt):
            assert begins_once(ids, tokenizer, bos)


@pytest.mark.parametrize("template_name", TEMPLATES)
@pytest.mark.parametrize("train_on", ["assistant", "last", "all"])
@pytest.mark.parametrize("max_length", [60, 512])
def test_bos_is_never_supervised(template_name: str, train_on: TrainOn, max_length: int) -> None:
    for family in ("llama2", "glm", "gemma"):
        tokenizer, template = made(family, template_name)
        bos = tokenizer.encode(vocabularies.FAMILIES[family][1], add_special_tokens=False)
        encoder = ExampleEncoder(tokenizer, template, train_on, max_length)
        found = [one for one in encode(encoder, CONVERSATIONS) if isinstance(one, Example)]
        assert found
        for one in found:
            assert begins_once(one.input_ids.tolist(), tokenizer, vocabularies.FAMILIES[family][1])
            supervised = one.input_ids[one.loss_mask].tolist()
            assert not {*bos} & {*supervised}


def test_a_template_that_writes_bos_itself_is_left_alone() -> None:
    for own in ("{{ bos_token }}" + OWN, "<|begin_of_text|>" + OWN):
        _, template = made("llama3", "tokenizer", own)
        assert template.chat_template == own


def test_bos_in_some_conversations_only_is_refused() -> None:
    sometimes = "{% if messages[0]['role'] == 'system' %}{{ bos_token }}{% endif %}" + OWN
    with pytest.raises(UserError, match=r"begins only some conversations with '<"):
        made("llama3", "tokenizer", sometimes)


def test_bos_that_no_text_can_write_is_refused() -> None:
    tokenizer = vocabularies.plain()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = vocabularies.around(backend, ["Ġt"])  # a word like any other
    tokenizer.chat_template = OWN
    with pytest.raises(UserError, match="does not read it as a token"):
        templates.make("chatml", tokenizer)


@pytest.mark.parametrize("template_name", TEMPLATES)
@pytest.mark.parametrize("family", vocabularies.FAMILIES)
def test_the_merged_tokenizer_writes_bos_once(
    family: str, template_name: str, tmp_path: Path
) -> None:
    tokenizer, template = made(family, template_name)
    bos = vocabularies.FAMILIES[family][1]
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    merged = merge(tmp_path / "tokenizer", template, tmp_path / "merged")
    for messages in CONVERSATIONS:
        chat = cast(list[dict[str, str]], messages[:-1])
        options: dict[str, Any] = {"add_generation_prompt": True}
        ids = merged.apply_chat_template(chat, return_dict=False, **options)
        text = merged.apply_chat_template(chat, tokenize=False, **options)
        assert ids == Encoder(tokenizer, template).encode_prompt(Conversation(messages))
        assert merged(text).input_ids == ids
        assert begins_once(ids, merged, bos)


def test_merged_tokenizer_keeps_spaces_after_control_tokens(tmp_path: Path) -> None:
    """Transformers drops `legacy` as it saves a LlamaTokenizer."""
    vocabularies.llama2().save_pretrained(tmp_path)
    config = files.read_json(tmp_path / "tokenizer_config.json")
    config |= {"tokenizer_class": "LlamaTokenizer", "legacy": True}
    files.write_json(tmp_path / "tokenizer_config.json", config)
    tokenizer = load_tokenizer(tmp_path)
    merged = merge(tmp_path, templates.make("guanaco", tokenizer), tmp_path / "merged")
    ids = merged.encode("<s>two</s>four", add_special_tokens=False)
    assert ids == tokenizer.encode("<s>two</s>four", add_special_tokens=False)
    assert merged.convert_ids_to_tokens(ids)[1].startswith("▁")
