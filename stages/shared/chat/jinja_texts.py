"""The templates of the project, in Jinja, as the merged model carries them.

`begin` and `end` are set in front of each: the tokenizer's first token, and what ends a reply.
"""

CHATML = r"""
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\n' + message['content'] + end + '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

# The prompt ends at the colon: the space belongs to the first token of the reply.
GUANACO = r"""
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- message['content'] + '\n' -}}
{%- elif message['role'] == 'user' -%}{{- '### Human: ' + message['content'] + '\n' -}}
{%- else -%}{{- '### Assistant: ' + message['content'] + end + '\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Assistant:' -}}{%- endif -%}
"""

LLAMA2 = r"""
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
