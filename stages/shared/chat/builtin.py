"""Chat templates that any model can be tuned with, as Jinja: chatml, guanaco, llama2.

`begin` opens a turn of llama2, `end` is the end token; `templates.make` sets both.
"""

# Tools and thoughts as Hermes and Qwen write them.
_CHATML = r"""
{%- if tools -%}
{{- '<|im_start|>system\n' -}}
{%- if messages[0]['role'] == 'system' -%}{{- messages[0]['content'] + '\n\n' -}}{%- endif -%}
{{- '# Tools\n\nYou may call one or more functions to assist with the user query.\n\n' -}}
{{- 'You are provided with function signatures within <tools></tools> XML tags:\n<tools>' -}}
{%- for tool in tools -%}{{- '\n' + (tool | tojson) -}}{%- endfor -%}
{{- '\n</tools>\n\nFor each function call, return a json object with function name and ' -}}
{{- 'arguments within <tool_call></tool_call> XML tags:\n<tool_call>\n' -}}
{{- '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>' + end + '\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'tool' -%}
{%- if loop.previtem is not defined or loop.previtem['role'] != 'tool' -%}
{{- '<|im_start|>user' -}}{%- endif -%}
{{- '\n<tool_response>\n' + message['content'] + '\n</tool_response>' -}}
{%- if loop.nextitem is not defined or loop.nextitem['role'] != 'tool' -%}
{{- end + '\n' -}}{%- endif -%}
{%- elif not (tools and loop.first and message['role'] == 'system') -%}
{{- '<|im_start|>' + message['role'] + '\n' -}}
{%- if message['reasoning_content'] -%}
{{- '<think>\n' + message['reasoning_content'] + '\n</think>\n\n' -}}{%- endif -%}
{{- message['content'] -}}
{%- for call in message['tool_calls'] -%}
{{- '\n' if message['content'] or not loop.first -}}
{{- '<tool_call>\n{"name": "' + call['function']['name'] + '", "arguments": ' -}}
{{- (call['function']['arguments'] | tojson) + '}\n</tool_call>' -}}
{%- endfor -%}
{{- end + '\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""
# The prompt ends at the colon: the space belongs to the reply's first token.
_GUANACO = r"""
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- message['content'] + '\n' -}}
{%- elif message['role'] == 'user' -%}{{- '### Human: ' + message['content'] + '\n' -}}
{%- else -%}{{- '### Assistant: ' + message['content'] + end + '\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:' -}}{%- endif -%}
"""
_LLAMA2 = r"""
{%- set system, turns = '', messages -%}
{%- if messages[0]['role'] == 'system' -%}
{%- set system = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' -%}
{%- set turns = messages[1:] -%}
{%- endif -%}
{%- for message in turns -%}
{%- if message['role'] == 'user' -%}
{{- begin + '[INST] ' + (system if loop.first else '') + message['content'] + ' [/INST]' -}}
{%- else -%}{{- ' ' + message['content'] + ' ' + end -}}{%- endif -%}
{%- endfor -%}
"""
# With markers that are plain text unless the tokenizer has a token for them.
TEMPLATES = {
    "chatml": (_CHATML, ("<|im_start|>",)),
    "guanaco": (_GUANACO, ("### Human:", "### Assistant:")),
    "llama2": (_LLAMA2, ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")),
}
