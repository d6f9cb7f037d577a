"""Every key that metrics.jsonl may hold: its meaning, unit, range, and the stages that write it.

The one place that defines them: ``kltune explain`` reads it, and tests hold what the stages write against it. What was
not measured is null, never 0.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

ALL = ("sft", "reward", "ppo", "trpo", "dpo", "distill")
POLICIES = ("sft", "ppo", "trpo", "dpo", "distill")      # that train a policy, whose answers they evaluate
BUDGETED = ("ppo", "trpo", "dpo", "distill")             # that hold a KL budget, on answers of every step
SCORED = ("ppo", "trpo", "dpo")               # whose responses have a score
LEARNT = ("sft", "reward", "dpo")           # that learn from rows of data
SHARE, ABOVE_0, ANY = "0 to 1", "0 or above", "any number"

# In every row of every stage, null where the stage does not measure it, so that whoever reads need not ask which.
ALWAYS = (
    "kl/ref_nats_per_response", "kl/ref_stderr", "kl/ref_nats_per_token", "kl/beta", "kl/step_nats_per_response",
    "score/mean", "time/step_seconds", "time/sample_seconds", "time/update_seconds", "responses_per_second",
)


@dataclass(frozen=True)
class Metric:
    """A key of metrics.jsonl.

    name: in capitals what a run fills in. example: a likely value. of_reference: ``eval/reference_...`` is the same of
    the reference's own answers, measured once in a run.
    """

    name: str
    unit: str
    range: str
    stages: tuple[str, ...]
    example: Any
    meaning: str
    of_reference: bool = False


METRICS = (
    Metric("step", "steps", "1 or above", ALL, 20, "turn of the loop, from 1"),
    Metric("nonfinite", "names", "a list", ALL, ["loss/mean"],
           "names of the numbers of this row that were NaN or infinite, and are null in it; absent without"),
    # the KL of the step's responses
    Metric("kl/ref_nats_per_response", "nats per response", ABOVE_0, BUDGETED, 5.93,
           "KL(policy‖reference) of the step's responses: exact over the vocabulary at each position, summed over a "
           "response, averaged over responses; with kl.exact: false sampled (k1)"),
    Metric("kl/ref_stderr", "nats per response", ABOVE_0, BUDGETED, 0.11,
           "standard error of kl/ref_nats_per_response; responses to one prompt count as dependent"),
    Metric("kl/ref_nats_per_token", "nats per token", ABOVE_0, BUDGETED, 0.124,
           "KL(policy‖reference) of the step's responses: nats of all of them ÷ tokens of all of them"),
    Metric("kl/ref_k1_nats_per_response", "nats per response", "any number; below 0 by chance", BUDGETED, 5.88,
           "KL(policy‖reference) of the step's responses from the sampled tokens alone, log π − log ρ (k1): noisier, "
           "and within its error of the exact one"),
    Metric("kl/beta", "score per nat; dpo: loss ÷ dpo.beta per nat; distill: nats per nat", ABOVE_0, BUDGETED, 0.15,
           "price of one nat of KL(policy‖reference) in this step; distill: beside one of KL(policy‖teacher)"),
    Metric("kl/beta_feed_forward", "score per nat", ABOVE_0, ("ppo", "trpo"), 0.17,
           "the price at which scores as far apart as this step's would hold an ideal policy at the target"),
    Metric("kl/step_nats_per_response", "nats per response", ABOVE_0, BUDGETED, 0.08,
           "KL(old‖new) of the step (ppo, distill: k3 before the last update, times the square of all ÷ those before; "
           "trpo: exact, 0 if none was accepted; dpo: k3, where there is a target or a cap)"),
    Metric("kl/teacher_nats_per_response", "nats per response", ABOVE_0, ("distill",), 3.1,
           "KL(policy‖teacher) of the step's responses, exact over the vocabulary at each position; of a served "
           "teacher estimated without bias, so that chance may put it below 0"),
    Metric("kl/teacher_stderr", "nats per response", ABOVE_0, ("distill",), 0.1,
           "standard error of kl/teacher_nats_per_response"),
    Metric("distill/loss", "nats per response", ANY, ("distill",), 2.4,
           "KL(policy‖teacher) and what KL(policy‖reference) costs beside it, as a mixture: their sum ÷ (1 + kl/beta)"),
    Metric("distill/grad_norm", "norm", ABOVE_0, ("distill",), 0.8,
           "norm of the gradient before clipping to optim.max_grad_norm, mean over the step's minibatches"),
    Metric("distill/minibatches", "updates", "1 or above", ("distill",), 1, "updates made; fewer at the step's limit"),
    Metric("eval/kl_teacher_nats_per_response", "nats per response", ABOVE_0, ("distill",), 3.0,
           "KL(policy‖teacher) on the answers, exact, or as kl/teacher_nats_per_response", of_reference=True),
    Metric("eval/kl_teacher_stderr", "nats per response", ABOVE_0, ("distill",), 0.1,
           "standard error of eval/kl_teacher_nats_per_response", of_reference=True),
    Metric("kl/step_limit_nats_per_response", "nats per response", ABOVE_0, ("ppo", "dpo", "distill"), 0.1,
           "how far the step might move the policy, by what is left to the target or the cap; null without either"),
    Metric("kl/score_correlation", "none", "−1 to 1", SCORED, 0.4,
           "correlation of score and log π − log ρ over responses: near 1 the KL is spent on the score, near 0 it is "
           "drift"),
    Metric("kl/cap_rollbacks", "times", ABOVE_0, BUDGETED, 0,
           "with kl.hard_cap: times that the run went back, since its start"),
    Metric("kl/cap_refusals", "steps", ABOVE_0, BUDGETED, 0,
           "with kl.hard_cap: steps that trpo's line search shortened or left out for the cap, since the run's start"),
    Metric("kl/loss_ref_nats_per_response", "nats per response", ABOVE_0, ("dpo",), 1.2,
           "with dpo.reference_alpha: exact KL of the step's responses to the reference that the loss has moved; "
           "every other KL is to the frozen one"),
    Metric("kl/fwd_offline_nats_per_response", "nats per response", "any number; below 0 by chance", ("dpo",), 0.9,
           "with dpo.from_reference: KL(reference‖policy) estimated on the step's pairs, which the reference must "
           "have sampled"),
    Metric("sampler/kl_nats_per_token", "nats per token", ABOVE_0, ("ppo", "trpo", "dpo"), 1e-9,
           "with sampling.engine: vllm: KL of the server's distribution from the trainer's, by k3 on the step's "
           "responses; more than rounding ends the run"),
    Metric("sampler/kl_stderr", "nats per token", ABOVE_0, ("ppo", "trpo", "dpo"), 1e-10,
           "standard error of sampler/kl_nats_per_token; null for one prompt"),
    # scores and responses of the step
    Metric("score/mean", "score", ANY, ("reward", *SCORED), 1.5,
           "mean score of the step's responses, missing-end penalty included; reward: of the batch's rows"),
    Metric("score/sd", "score", ABOVE_0, SCORED, 0.8, "standard deviation of the step's scores"),
    Metric("policy/entropy_nats_per_token", "nats per token", "0 to log(vocabulary)", BUDGETED, 2.1,
           "mean entropy of the policy's next-token distributions on the step's responses"),
    Metric("policy/first_gap_nats_per_token", "nats per token", ABOVE_0, ("ppo", "trpo"), 2e-7,
           "mean difference, before the step's first update, between the tokens' log-probabilities and those of when "
           "they were sampled: rounding that depends on the batch"),
    Metric("policy/first_gap_largest_nats", "nats", ABOVE_0, ("ppo", "trpo"), 2e-6,
           "the largest of the differences that policy/first_gap_nats_per_token is the mean of"),
    Metric("policy/entropy_price", "score per nat", ABOVE_0, ("ppo",), 0.05,
           "with ppo.entropy_floor: what a nat of entropy earns in this step; 0 far above the floor"),
    Metric("response/tokens", "tokens per response", "1 to sampling.max_new_tokens", BUDGETED, 46.2,
           "mean length of the step's responses, end token included"),
    Metric("response/truncated_fraction", "share", SHARE, BUDGETED, 0.1,
           "share of the step's responses cut at sampling.max_new_tokens before they ended"),
    # losses and updates
    Metric("loss/mean", "sft: nats per token; reward: nats per row; dpo: unit of dpo.loss", ANY, LEARNT, 0.62,
           "mean loss of the step's batch before its update; reward: without the price of centring"),
    Metric("accuracy/mean", "share", SHARE, ("reward", "dpo"), 0.65,
           "share of the batch's pairs the right way round, a tie counting half; dpo: whose chosen response gained "
           "more on the reference (null for kto, bco); reward: that scores higher"),
    Metric("optim/lr", "none", ABOVE_0, ("sft", "reward", "ppo", "dpo", "distill"), 0.0001,
           "learning rate; ppo, dpo, distill: the schedule's, or less where it would pass the step's limit"),
    Metric("sft/grad_norm", "norm", ABOVE_0, ("sft",), 1.1,
           "norm of the gradient before clipping to optim.max_grad_norm"),
    Metric("sft/tokens", "tokens", "1 or above", ("sft",), 2048, "tokens of the step's batch that the loss is of"),
    Metric("reward/gap", "score", ANY, ("reward",), 0.7,
           "mean of score(chosen) − score(rejected) over the batch's pairs"),
    Metric("reward/grad_norm", "norm", ABOVE_0, ("reward",), 1.1,
           "norm of the gradient before clipping to optim.max_grad_norm"),
    # ppo: means over a step's minibatches
    Metric("ppo/clip_fraction", "share", SHARE, ("ppo",), 0.06,
           "share of the tokens whose probability ratio left 1 ± ppo.clip_range, mean over the step's minibatches"),
    Metric("ppo/policy_loss", "advantage", ANY, ("ppo",), -0.02,
           "clipped policy loss, mean over the step's minibatches"),
    Metric("ppo/policy_grad_norm", "norm", ABOVE_0, ("ppo",), 0.4,
           "norm of the policy's gradient before clipping to optim.max_grad_norm, mean over the step's minibatches"),
    Metric("ppo/minibatches", "updates", "1 or above", ("ppo",), 4,
           "updates made in the step; fewer than planned where it came to its limit, or to ppo.stop_step_kl"),
    Metric("ppo/value_explained", "share", "at most 1", ("ppo",), 0.6,
           "share of the returns' variance that the values foretold; near or below 0 they explain nothing"),
    Metric("ppo/value_loss", "score²", ABOVE_0, ("ppo",), 0.3,
           "loss of the value function before ppo.value_coef, mean over minibatches (ppo.baseline: value)"),
    Metric("ppo/value_grad_norm", "norm", ABOVE_0, ("ppo",), 0.5,
           "norm of the value function's gradient before clipping, mean over minibatches (ppo.baseline: value)"),
    # trpo
    Metric("trpo/radius_nats_per_response", "nats per response", "above 0, at most trpo.max_step_kl", ("trpo",), 0.2,
           "what KL(old‖new) may be in this step: ½ (trpo/gain_rate ÷ kl/beta)², at most trpo.max_step_kl and what is "
           "left to the target or the cap"),
    Metric("trpo/first_try_nats_per_response", "nats per response", ABOVE_0, ("trpo",), 0.22,
           "KL(old‖new) of the first length tried; where it is far above the radius, the quadratic model fails"),
    Metric("trpo/predicted_gain", "score per response", ABOVE_0, ("trpo",), 0.31,
           "gain of the surrogate that the gradient foretold for the step taken"),
    Metric("trpo/gain", "score per response", ANY, ("trpo",), 0.28, "gain of the surrogate measured after the step"),
    Metric("trpo/last_gain_on_new_responses", "score per response", ANY, ("trpo",), 0.05,
           "what this step's responses say that the step before gained, its KL paid for; null where none was taken"),
    Metric("trpo/gain_rate", "score per √nat", ANY, ("trpo",), 0.2,
           "running mean of what a step gains per √nat of KL(old‖new), its KL not paid for, as seen by the next step's "
           "responses; null until there was one"),
    Metric("trpo/gradient_norm", "norm", ABOVE_0, ("trpo",), 0.9, "norm of the policy's gradient"),
    Metric("trpo/mean_curvature", "nats per parameter²", ABOVE_0, ("trpo",), 0.003,
           "mean curvature of KL(old‖new) over the trained parameters"),
    Metric("trpo/damping", "multiples of trpo/mean_curvature", ABOVE_0, ("trpo",), 100, "added to the curvature"),
    Metric("trpo/cg_residual", "none", ABOVE_0, ("trpo",), 0.001,
           "how well conjugate gradients solved for the step: ‖residual‖ ÷ ‖gradient‖"),
    Metric("trpo/cg_iterations", "iterations", "0 to trpo.cg_iterations", ("trpo",), 10,
           "iterations of conjugate gradients taken"),
    Metric("trpo/line_search_tries", "tries", "0 to trpo.line_search_steps", ("trpo",), 1, "step lengths tried"),
    Metric("trpo/accepted", "none", "0 or 1", ("trpo",), 1,
           "1 if a step was taken; at 0 the policy is as it was, bit for bit"),
    Metric("trpo/value_explained", "share", "at most 1", ("trpo",), 0.6,
           "share of the returns' variance that the values foretold; near or below 0 they explain nothing"),
    Metric("trpo/value_loss", "score²", ABOVE_0, ("trpo",), 0.3,
           "loss of the value function, mean over its updates (trpo.baseline: value)"),
    Metric("trpo/value_grad_norm", "norm", ABOVE_0, ("trpo",), 0.5,
           "norm of the value function's gradient before clipping, mean over its updates (trpo.baseline: value)"),
    # dpo
    Metric("dpo/grad_norm", "norm", ABOVE_0, ("dpo",), 0.8,
           "norm of the gradient, price of KL included, before clipping to optim.max_grad_norm"),
    Metric("dpo/beta", "reward per nat", "above 0", ("dpo",), 0.12,
           "with dpo.dynamic_beta: the loss's beta in this step; the price of KL is kl/beta"),
    Metric("dpo/margin_mean_nats", "nats per pair", ANY, ("dpo",), 1.4,
           "with dpo.dynamic_beta: running mean of the batches' margins"),
    Metric("dpo/margin_nats", "nats per pair", ANY, ("dpo",), 0.6,
           "with dpo.reference_alpha: the margin to the reference that the loss has moved"),
    Metric("pairs/margin_nats", "nats per pair", ANY, ("dpo",), 2.3,
           "mean log π − log ρ of the step's chosen responses less that of the rejected ones; no KL: the policy did "
           "not sample them"),
    Metric("pairs/chosen_log_ratio_nats", "nats per response", ANY, ("dpo",), -0.4,
           "mean log π − log ρ of the step's chosen responses; may fall"),
    Metric("pairs/rejected_log_ratio_nats", "nats per response", ANY, ("dpo",), -2.7,
           "mean log π − log ρ of the step's rejected responses"),
    Metric("pairs/count", "pairs", "0 to sampling.prompts_per_step", ("dpo",), 30,
           "with dpo.source: online: pairs made of the step's responses"),
    Metric("pairs/ties", "prompts", "0 to sampling.prompts_per_step", ("dpo",), 2,
           "with dpo.source: online: prompts that gave no pair, because their answers score alike or are the same"),
    Metric("pairs/reward_mean", "reward", ANY, ("dpo",), -0.05,
           "with dpo.loss: bco: mean reward that the loss implies in the step's responses, dpo.beta × (log π − log ρ)"),
    # held-out answers, every run.eval_every steps and always with the same random numbers
    Metric("eval/kl_ref_nats_per_response", "nats per response", ABOVE_0, POLICIES, 5.9,
           "exact KL(policy‖reference) on answers to held-out prompts"),
    Metric("eval/kl_ref_stderr", "nats per response", ABOVE_0, POLICIES, 0.1,
           "standard error of eval/kl_ref_nats_per_response"),
    Metric("eval/kl_ref_nats_per_token", "nats per token", ABOVE_0, POLICIES, 0.12,
           "exact KL(policy‖reference) on answers to held-out prompts: nats of all ÷ tokens of all"),
    Metric("eval/prompts", "prompts", "1 to eval.responses", POLICIES, 128,
           "different held-out prompts that were answered"),
    Metric("eval/agreement_z", "standard errors", ANY, POLICIES, 0.4,
           "sampled KL (k1) less the exact one, in standard errors; beyond ±4 the sampler drew from another "
           "distribution"),
    Metric("eval/noise_floor_nats_per_response", "nats per response", ABOVE_0, POLICIES, 2e-8,
           "KL that rounding alone makes: of the policy as it sampled the answers to itself as it was measured on them "
           "(k3); in bfloat16 about 1e-4 to 1e-3 nats a token"),
    Metric("eval/truncated_fraction", "share", SHARE, POLICIES, 0.1,
           "share of the answers cut at sampling.max_new_tokens before they ended"),
    Metric("eval/score_mean", "score", ANY, ("reward", *SCORED), 1.6,
           "mean score of the answers; reward: of the held-out rows' responses", of_reference=True),
    Metric("eval/score_stderr", "score", ABOVE_0, SCORED, 0.09, "standard error of eval/score_mean", of_reference=True),
    Metric("eval/score_z", "sd of the reference's scores", ANY, SCORED, 1.2,
           "eval/score_mean less the reference's own, in standard deviations of its scores", of_reference=True),
    Metric("eval/score_z_stderr", "sd of the reference's scores", ABOVE_0, SCORED, 0.07,
           "standard error of eval/score_z", of_reference=True),
    Metric("eval/gold_mean", "gold score", ANY, POLICIES, -0.9,
           "mean score of the answers by eval.gold, which is never trained on", of_reference=True),
    Metric("eval/gold_stderr", "gold score", ABOVE_0, POLICIES, 0.12,
           "standard error of eval/gold_mean", of_reference=True),
    Metric("eval/gold_z", "sd of the reference's gold scores", ANY, POLICIES, 0.5,
           "eval/gold_mean less the reference's own, in standard deviations of its gold scores", of_reference=True),
    Metric("eval/gold_z_stderr", "sd of the reference's gold scores", ABOVE_0, POLICIES, 0.08,
           "standard error of eval/gold_z", of_reference=True),
    Metric("eval/gold_gap", "sd of the reference's scores", ANY, SCORED, 0.7,
           "eval/score_z − eval/gold_z: how far the score has run ahead of gold", of_reference=True),
    Metric("eval/win_rate", "share", SHARE, POLICIES, 0.63,
           "how often eval.judge prefers the policy's answers to the reference's, a tie ½"),
    Metric("eval/win_rate_low", "share", SHARE, POLICIES, 0.54, "lower end of its 95 % interval, by prompt"),
    Metric("eval/win_rate_high", "share", SHARE, POLICIES, 0.71, "upper end of its 95 % interval, by prompt"),
    Metric("eval/distinct_1", "share", SHARE, POLICIES, 0.2,
           "different tokens as a share of all, first 50 tokens of each answer", of_reference=True),
    Metric("eval/distinct_2", "share", SHARE, POLICIES, 0.45,
           "different pairs of tokens as a share of all, first 50 tokens of each answer", of_reference=True),
    Metric("eval/distinct_2_adjusted", "share", ABOVE_0, POLICIES, 0.46,
           "different pairs of tokens as a share of those that chance would give: longer answers are not worse off",
           of_reference=True),
    Metric("eval/distinct_2_adjusted_stderr", "share", ABOVE_0, POLICIES, 0.02,
           "standard error of eval/distinct_2_adjusted, by prompt; null below 10 prompts", of_reference=True),
    Metric("eval/distinct_2_per_input", "share", SHARE, POLICIES, 0.7,
           "eval/distinct_2 within the answers to one prompt, mean over prompts; null with one answer each",
           of_reference=True),
    Metric("eval/distinct_2_across_input", "share", SHARE, POLICIES, 0.5,
           "eval/distinct_2 of one answer to each prompt", of_reference=True),
    Metric("eval/self_bleu", "none", SHARE, POLICIES, 0.3,
           "mean BLEU-4 of each answer against all others; 1: everything has been said before", of_reference=True),
    Metric("eval/duplicate_fraction", "share", SHARE, POLICIES, 0.02,
           "share of the answers that repeat an earlier one token for token", of_reference=True),
    Metric("eval/entropy_nats_per_token", "nats per token", "0 to log(vocabulary)", POLICIES, 2.0,
           "mean entropy of the policy's next-token distributions on its answers", of_reference=True),
    Metric("eval/response_tokens", "tokens per response", "1 to sampling.max_new_tokens", POLICIES, 44.0,
           "mean length of the answers, end token included", of_reference=True),
    Metric("eval/response_tokens_stderr", "tokens per response", ABOVE_0, POLICIES, 1.1,
           "standard error of eval/response_tokens, by prompt", of_reference=True),
    Metric("eval/end_fraction", "share", SHARE, POLICIES, 0.9,
           "share of the answers that end by themselves", of_reference=True),
    # held-out texts, pairs and rows
    Metric("eval/texts_nats_per_token", "nats per token", ABOVE_0, POLICIES, 1.42,
           "loss on eval.texts", of_reference=True),
    Metric("eval/perplexity", "none", "1 or above", POLICIES, 4.13, "exp of eval/texts_nats_per_token"),
    Metric("eval/tax_nats_per_token", "nats per token", ANY, POLICIES, 0.04,
           "alignment tax: how much worse eval.texts are predicted than by the reference, document by document"),
    Metric("eval/tax_stderr", "nats per token", ABOVE_0, POLICIES, 0.005, "standard error of eval/tax_nats_per_token"),
    Metric("eval/accuracy", "share", SHARE, ("reward", "dpo"), 0.6,
           "share of the held-out pairs the right way round, counted as accuracy/mean is"),
    Metric("eval/accuracy_low", "share", SHARE, ("reward", "dpo"), 0.53,
           "lower end of the 95 % interval of eval/accuracy"),
    Metric("eval/accuracy_high", "share", SHARE, ("reward", "dpo"), 0.67,
           "upper end of the 95 % interval of eval/accuracy"),
    Metric("eval/margin_nats", "nats per pair", ANY, ("dpo",), 1.9, "pairs/margin_nats on eval.pairs"),
    Metric("eval/margin_stderr", "nats per pair", ABOVE_0, ("dpo",), 0.2, "standard error of eval/margin_nats"),
    Metric("eval/chosen_log_ratio_nats", "nats per response", ANY, ("dpo",), -0.5,
           "pairs/chosen_log_ratio_nats on eval.pairs"),
    Metric("eval/rejected_log_ratio_nats", "nats per response", ANY, ("dpo",), -2.4,
           "pairs/rejected_log_ratio_nats on eval.pairs"),
    Metric("eval/loss", "nats per row", ABOVE_0, ("reward",), 0.6,
           "loss on the held-out rows, without margin, smoothing and centring"),
    Metric("eval/score_sd", "score", ABOVE_0, ("reward",), 1.3,
           "standard deviation of the scores of the held-out rows' responses"),
    Metric("eval/calibration_error", "share", SHARE, ("reward",), 0.04,
           "of the probability that a held-out row is as it was judged, σ(score difference), of labelled responses "
           "σ(score): mean distance of predicted and observed"),
    Metric("eval/length_correlation", "none", "−1 to 1", ("reward",), 0.2,
           "rank correlation over held-out pairs of the differences in score and in tokens; of labelled responses, of "
           "score and tokens"),
    Metric("eval/longer_is_chosen", "share", SHARE, ("reward",), 0.55,
           "share of the held-out pairs whose longer response is the chosen one"),
    Metric("eval/longer_scores_higher", "share", SHARE, ("reward",), 0.6,
           "share of the held-out pairs whose longer response scores higher"),
    # an AI judge, in reward, eval.gold or eval.judge; NAME is the entry's name
    Metric("judge/NAME_asked", "questions", ABOVE_0, POLICIES, 64,
           "questions sent to the judge NAME since the last row, tries included"),
    Metric("judge/NAME_kept", "questions", ABOVE_0, POLICIES, 0,
           "questions answered without asking NAME: equal ones, and those whose answer is in judge.jsonl"),
    Metric("judge/NAME_unreadable", "tries", ABOVE_0, POLICIES, 1,
           "tries whose answer by NAME was no number, or no preference, beyond doubt"),
    Metric("judge/NAME_unanswered", "tries", ABOVE_0, POLICIES, 0, "tries that NAME did not answer"),
    # where the time goes
    Metric("time/step_seconds", "seconds", ABOVE_0, ALL, 3.2, "the whole step by wall clock"),
    Metric("time/sample_seconds", "seconds", ABOVE_0, BUDGETED, 1.4, "sampling responses and measuring their KL"),
    Metric("time/score_seconds", "seconds", ABOVE_0, SCORED, 0.2, "scoring or comparing responses"),
    Metric("time/update_seconds", "seconds", ABOVE_0, ALL, 1.5, "updates of the weights"),
    Metric("time/eval_seconds", "seconds", ABOVE_0, ALL, 8.0, "evaluation on held-out data"),
    Metric("responses_per_second", "responses per second", ABOVE_0, BUDGETED, 20.0,
           "responses of the step ÷ its seconds, evaluation left out"),
    Metric("tokens_per_second", "tokens per second", ABOVE_0, ALL, 2100.0,
           "tokens that the step sampled or learnt from, prompts included, ÷ its seconds without evaluation"),
    Metric("memory/peak_gb", "GB", ABOVE_0, ALL, 3.1,
           "the most memory there was in use: on a GPU in tensors, during the step; on a CPU of the whole process, "
           "since it began"),
    Metric("examples_per_second", "rows per second", ABOVE_0, LEARNT, 40.0,
           "rows of data learnt from ÷ the step's seconds, evaluation left out"),
)


def of_the_reference(metric: Metric) -> Metric:
    """``eval/reference_X`` of ``eval/X``."""
    return replace(
        metric, name=metric.name.replace("eval/", "eval/reference_"), of_reference=False,
        meaning=f"as {metric.name}, of the reference's own answers (texts: by the reference); measured once in a run",
        stages=tuple(stage for stage in metric.stages if stage in POLICIES),
    )


def metric_named(key: str) -> Metric | None:
    """The entry of a key as metrics.jsonl has it, of its pattern (``judge/NAME_asked``), or None."""
    for metric in (*METRICS, *(of_the_reference(metric) for metric in METRICS if metric.of_reference)):
        if re.fullmatch(re.escape(metric.name).replace("NAME", ".+"), key):
            return metric
    return None
