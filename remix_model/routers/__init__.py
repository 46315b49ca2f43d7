"""The types of routers, one a file; `base` says what a type is and how to add one."""

from remix_model.routers import remix, uniform, mixlora, hydralora, mor  # noqa: F401, I001  registers
from remix_model.routers.base import ROUTERS, Router, make_router, register_router

__all__ = ["ROUTERS", "Router", "make_router", "register_router"]
