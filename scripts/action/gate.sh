#!/usr/bin/env bash
# The step of action.yml: the gate, its exit code, kl.json and kl.xml, and the verdict as an output of the step.
# Everything comes from the environment: nothing that a pull request names becomes part of a command.
set -uo pipefail
: "${CHECKPOINT:?a run, checkpoint, adapter or model}" "${MAX_KL:?a budget in nats per response}"
options=(--max-kl "$MAX_KL" --junit kl.xml --json)
[[ "$CHECKPOINT${REFERENCE:-}" == *://* ]] || options+=(--auto --max-responses "${MAX_RESPONSES:-4096}")
[[ -z "${PROMPTS:-}" ]] || options+=(--prompts "$PROMPTS")
[[ -z "${REFERENCE:-}" ]] || options+=(--reference "$REFERENCE")
[[ -z "${MAX_NEW_TOKENS:-}" ]] || options+=(--max-new-tokens "$MAX_NEW_TOKENS")
${KLTUNE:-kltune} eval-kl "${options[@]}" -- "$CHECKPOINT" > kl.json
code=$?
if [[ -s kl.json ]]; then
  python3 - >> "${GITHUB_OUTPUT:-/dev/stdout}" <<'PYTHON'
import json

document = json.load(open("kl.json", encoding="utf-8"))
figures = document["kl"].get("exact") or document["kl"]["topk"]
print(f"verdict={document['gate']['verdict']}\nkl={figures['nats_per_response']:.6g}")
PYTHON
fi
exit "$code"
