"""What holds of vLLM's server holds of this one: the same tests, against it.

Left out is what it refuses: structured outputs, and what forces texts with them; echo; beam search.
"""

from tests.vllm.shapes.test_api import (
    likely,
    test_a_client_that_leaves_a_stream,
    test_a_client_that_leaves_before_the_answer,
    test_a_truncated_prompt,
    test_ends,
    test_logprobs_and_sampling,
    test_the_longest_prompt,
    test_up_to_the_end_of_the_context,
    test_what_vllm_refuses_leaves_no_trace,
)
from tests.vllm.shapes.test_choices import (
    test_a_name_like_a_choice_of_another,
    test_any_name,
    test_choices_of_one_prompt,
    test_choices_of_several_prompts,
    test_ids_and_priority_in_the_body,
    test_the_same_name_at_the_same_time,
    test_the_same_name_one_after_the_other,
    test_the_stream_of_one_request_has_all_its_choices,
)
from tests.vllm.shapes.test_text import test_random_sampling

__all__ = [
    "likely",
    "test_a_client_that_leaves_a_stream",
    "test_a_client_that_leaves_before_the_answer",
    "test_a_name_like_a_choice_of_another",
    "test_a_truncated_prompt",
    "test_any_name",
    "test_choices_of_one_prompt",
    "test_choices_of_several_prompts",
    "test_ends",
    "test_ids_and_priority_in_the_body",
    "test_logprobs_and_sampling",
    "test_random_sampling",
    "test_the_longest_prompt",
    "test_the_same_name_at_the_same_time",
    "test_the_same_name_one_after_the_other",
    "test_the_stream_of_one_request_has_all_its_choices",
    "test_up_to_the_end_of_the_context",
    "test_what_vllm_refuses_leaves_no_trace",
]
