"""All routers, by the value of `model.moe.router`. One that is added here is tested as they are."""

from __future__ import annotations

from megaswitch.model.expert_choice import ExpertChoiceRouter
from megaswitch.model.ntlb import NoTokenLeftBehindRouter
from megaswitch.model.router import Router, SwitchRouter
from megaswitch.model.top_2 import Top2Router

ROUTERS: dict[str, type[Router]] = {
    "switch": SwitchRouter,
    "top-2": Top2Router,
    "ntlb": NoTokenLeftBehindRouter,
    "expert-choice": ExpertChoiceRouter,
}
