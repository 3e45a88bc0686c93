"""Ollama's Modelfile: its Go template renders what the Jinja does."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from stages.export import modelfile
from stages.export.llama_cpp import Unsupported
from stages.shared.chat import templates
from tests import tiny, vocabularies

TALK = [
    {"role": "user", "content": ' a "b" {{ .X }} \\n <b>&é🙂\n\n'},
    {"role": "assistant", "content": " Yes.\n"},
    {"role": "user", "content": "Why?"},
]
CASES = [TALK, TALK[:1], [{"role": "system", "content": "Be brief."}, *TALK]]
OWN = (  # as SmolLM2's: a system message where there is none
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nHelp."
    "<|im_end|>\n{% endif %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What text/template of Go is given: the texts and the cases; it prints what it renders.
GO = """package main
import ("encoding/json"; "os"; "strings"; "text/template")
func main() {
  var in struct { Template string; Cases [][]map[string]string }
  json.NewDecoder(os.Stdin).Decode(&in)
  t := template.Must(template.New("").Parse(in.Template))
  out := []string{}
  for _, c := range in.Cases {
    m := []struct{ Role, Content string }{}
    for _, x := range c { m = append(m, struct{ Role, Content string }{x["role"], x["content"]}) }
    var b strings.Builder
    if err := t.Execute(&b, map[string]any{"Messages": m}); err != nil { panic(err) }
    out = append(out, b.String())
  }
  json.NewEncoder(os.Stdout).Encode(out)
}
"""


def tokenizer_with(own: str | None = None) -> PreTrainedTokenizerFast:
    tokenizer = vocabularies.llama3() if own is None else tiny.tokenizer()
    tokenizer.chat_template = own
    return tokenizer


def rendered(name: str) -> tuple[modelfile.Literals, list[str]]:
    """Literals of a template, and the cases as its Jinja renders them."""
    tokenizer = tokenizer_with(OWN if name == "tokenizer" else None)
    jinja = templates.make(name, tokenizer).chat_template

    def render(messages: modelfile.Messages) -> str:
        options = {"tokenize": False, "add_generation_prompt": True}
        return str(tokenizer.apply_chat_template(messages, chat_template=jinja, **options))

    return modelfile.literals(render), [render(case) for case in CASES]


@pytest.mark.parametrize("name", ["chatml", "guanaco", "llama2", "tokenizer"])
def test_literals_render_what_the_jinja_does(name: str) -> None:
    texts, expected = rendered(name)
    for case, text in zip(CASES, expected, strict=True):
        turns = zip(["", *(m["role"] for m in case)], case, strict=False)
        parts = [texts.between.get((r, m["role"]), "") + m["content"] for r, m in turns]
        assert "".join(parts) + texts.prompt == text


@pytest.mark.skipif(not shutil.which("go"), reason="Go is not installed")
@pytest.mark.parametrize("name", ["chatml", "guanaco", "llama2", "tokenizer"])
def test_go_template_renders_what_the_jinja_does(tmp_path: Path, name: str) -> None:
    texts, expected = rendered(name)
    (tmp_path / "main.go").write_text(GO)
    given = json.dumps({"Template": modelfile.go_template(texts), "Cases": CASES})
    command = ["go", "run", str(tmp_path / "main.go")]
    done = subprocess.run(command, input=given, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == expected


def test_modelfile_is_greedy_and_stops_at_the_next_turn() -> None:
    texts, _ = rendered("guanaco")
    text = modelfile.modelfile(["model.gguf", "adapter.gguf"], texts, "<|eot_id|>", 131_072)
    head, template, tail = text.split('"""')
    assert head == "FROM ./model.gguf\nADAPTER ./adapter.gguf\nTEMPLATE "
    assert template.startswith('{{- $last := "" }}\n{{- range .Messages }}\n{{- if and (eq .Role')
    assert template.endswith('{{ $last = .Role }}\n{{- end }}{{ "\\n### Assistant:" }}')
    assert tail.split("\n")[1:] == [
        'PARAMETER stop "<|eot_id|>"',
        'PARAMETER stop "### Human:"',
        "PARAMETER num_ctx 8192",
        "PARAMETER temperature 0",
        "PARAMETER repeat_penalty 1.0",
        "",
    ]


def test_template_that_looks_further_back_is_refused() -> None:
    with pytest.raises(Unsupported, match="chat template"):
        modelfile.literals(lambda messages: "".join(f"{len(messages)}{m}" for m in messages))
