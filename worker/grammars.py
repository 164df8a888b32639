"""The matcher of a request that has a grammar. It is compiled on threads of its own, never in the loop."""

from __future__ import annotations

import asyncio

from engine.grammar.grammar import GrammarError
from engine.grammar.matcher import GrammarMatcher
from proto.common_pb2 import SequenceSpec
from servicekit.errors import InvalidRequest, Overloaded
from worker.async_engine import AsyncEngine
from worker.conversions import grammar_from_pb

COMPILE_TIMEOUT_S = 10.0
_PARAM = "structured_outputs"


async def build_matcher(engine: AsyncEngine, spec_pb: SequenceSpec) -> GrammarMatcher | None:
    """At the end of the output that there is already. None: no grammar is asked for.

    Raises InvalidRequest for a grammar that cannot be used, and Overloaded when others take all the time.
    """
    if not spec_pb.sampling.HasField("grammar"):
        return None
    grammar = grammar_from_pb(spec_pb.sampling.grammar)
    if engine.grammars is None:
        raise InvalidRequest("this worker has no structured output", param=_PARAM)
    compiling = engine.grammars.compile(grammar, spec_pb.output_ids)
    try:
        async with asyncio.timeout(COMPILE_TIMEOUT_S):
            return await asyncio.wrap_future(compiling)
    except GrammarError as error:
        raise InvalidRequest(f"grammar: {error}", param=_PARAM) from error
    except TimeoutError:
        if compiling.cancel():
            raise Overloaded("other grammars are being compiled, and take long") from None
        raise InvalidRequest(
            f"the grammar takes longer than {COMPILE_TIMEOUT_S:g} s to compile", param=_PARAM
        ) from None
