"""The prompt: one function, the service's formula, a template where there is no database."""

import re

from mondrian_ft.data.critique import DIMENSIONS, KEYS
from mondrian_ft.data.prompt import CLOSING, TEMPLATE, build_prompt, fingerprint
from mondrian_ft.data.store import JobStore

from .world import ANSEL_PROMPT, SYSTEM_PROMPT, World


def test_the_prompt_is_the_services(world: World):
    """System prompt, blank line, advisor's prompt, closing sentence; nothing added or trimmed."""
    text, source = build_prompt(JobStore(world.db), "ansel")
    assert text == f"{SYSTEM_PROMPT}\n\n{ANSEL_PROMPT}\n\nAnalyze the provided image."
    assert source == "config.system_prompt + advisors.prompt"


def test_an_advisor_without_a_prompt_gets_the_system_prompt_alone(world: World):
    text, source = build_prompt(JobStore(world.db), "watkins")
    assert text == f"{SYSTEM_PROMPT}\n\n{CLOSING}"
    assert source == "config.system_prompt"


def test_without_a_database_the_template_asks_for_the_schema_without_an_example():
    """A filled example's scores are copied by models, so the template states no score."""
    text, source = build_prompt(None, "ansel")
    assert source == "template"
    assert text == f"{TEMPLATE}\n\n{CLOSING}"
    assert all(word in text for word in (*KEYS, *DIMENSIONS))
    assert set(re.findall(r"\d+", text)) == {"0", "10"}
    assert len(text) > 100


def test_the_fingerprint_is_of_the_text_alone():
    assert fingerprint("a") == fingerprint("a") != fingerprint("a ")
    assert len(fingerprint("é")) == 64
