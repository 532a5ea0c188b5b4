#!/usr/bin/env bash
# Run a recipe from download to chat: every numbered stage found in pretrain/ and fine-tuning/, in order.
#
# Usage: bash run_all.sh [--recipe NAME] [--from NN] [--to NN] [--force] [--dry-run] [--list]
#                        [--set FILE.KEY=VALUE]... [--nproc N] [--deepspeed NAME | --fsdp] [--tensor-parallel N]
#                        [--max-restarts N] [--new-optimizer]
#
#   --recipe NAME    folder below configs/ (default: tiny)
#   --from, --to NN  number of the first and of the last stage to run
#   --force          start these stages over, even if they are done; their old output is replaced
#   --dry-run        check the configuration and say what would be done; exit code 2 if a stage would be refused
#   --list           list the stages
#   --set FILE.KEY=VALUE   override one key of the recipe, e.g. --set pretrain.learning_rate=1e-4
#   --nproc, --deepspeed, --fsdp, --tensor-parallel, --max-restarts, --new-optimizer
#                    for the training stages: bash pretrain/05_pretrain.sh --help
#
# Exit codes: 0 done, 1 a stage failed, 2 refused (wrong option or configuration, stale output, folder in use),
# 130 interrupted, 143 terminated. To continue after a stop, run the same command again, without --force.
set -euo pipefail
if ((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] < 404)); then
  echo "run_all.sh: error: this is bash $BASH_VERSION, but 4.4 or newer is needed (macOS: brew install bash)" >&2
  exit 2
fi
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
cd "$here"

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$here/run_all.sh"; }
refuse() { printf 'run_all.sh: error: %s\n\n' "$1" >&2; usage >&2; exit 2; }
stages() { printf '%s\n' "$here"/pretrain/[0-9][0-9]_* "$here"/fine-tuning/[0-9][0-9]_*; }

# Ctrl-C, kill, a closed terminal and what clusters send: the running stage gets the signal and saves its state.
stopped='' child='' dry=false refused=0
# shellcheck disable=SC2329 # by the traps
stop() {
  [[ -n $stopped ]] || stopped=$1
  # Between two stages there is nothing to wait for.
  [[ -n $child ]] || exit "$(code_of "$stopped")"
  kill -s "$1" "$child" 2>/dev/null || true
}
code_of() { case $1 in INT) echo 130 ;; *) echo 143 ;; esac; }

# Run a stage to its end, also when a signal interrupts the waiting.
run_stage() {
  local code=0
  # With job control the stage has a process group of its own: Ctrl-C reaches it once, through `stop`.
  set -m
  "$@" &
  child=$!
  set +m
  while wait "$child" || code=$?; kill -0 "$child" 2>/dev/null; do code=0; done
  if [[ -n $stopped ]]; then
    code=0
    wait "$child" || code=$?
    ((code == 130)) || code=$(code_of "$stopped")
  fi
  child=''
  # A dry run goes on after a refusal, to say what is to be done with the other stages, too.
  if $dry && ((code == 2)); then refused=2; return; fi
  ((code == 0)) || exit "$code"
}

# A function, so that bash reads the whole file before it starts: the file may be edited during a run.
main() {
  local recipe=tiny from=00 to=99 list=false common=() force=() overrides=() launch=() summary
  while (($#)); do
    case $1 in
      --recipe | --from | --to | --set | --nproc | --deepspeed | --tensor-parallel | --max-restarts)
        [[ $# -gt 1 && $2 != --* ]] || refuse "$1 needs a value"
        case $1 in
          --recipe) recipe=$2 ;;
          --from) from=$2 ;;
          --to) to=$2 ;;
          --set) overrides+=(--set "$2") common+=(--set "$2") ;;
          *) launch+=("$1" "$2") ;;
        esac
        shift ;;
      --force) force=("$1") common+=("$1") ;;
      --dry-run) common+=("$1") dry=true ;;
      --fsdp | --new-optimizer) launch+=("$1") ;;
      --list) list=true ;;
      -h | --help) usage; exit 0 ;;
      *) refuse "unknown option $1" ;;
    esac
    shift
  done
  for number in "$from" "$to"; do
    [[ $number =~ ^[0-9]{1,2}$ ]] || refuse "--from and --to need the number of a stage, got '$number'"
  done
  from=$(printf %02d "$((10#$from))") to=$(printf %02d "$((10#$to))")
  for number in "$from" "$to"; do
    [[ $number == 00 || $number == 99 ]] || compgen -G "$here/*/${number}_*" >/dev/null ||
      refuse "no stage $number: see --list"
  done

  if $list; then
    while read -r stage; do
      printf '%-28s %s\n' "${stage#"$here"/}" "$(sed -n 's/^\(# \|"""\)Stage [0-9]*: //p' "$stage" | head -n 1)"
    done < <(stages)
    exit 0
  fi

  local started=$SECONDS python stage number signal ran=0
  python=$(bash "$here/setup.sh" --python)
  # A notebook sets it to a module that this Python may not have. The stages draw into files.
  export MPLBACKEND=agg
  export PYTHONPATH=$here/pretrain${PYTHONPATH:+:$PYTHONPATH}
  ((SECONDS - started < 3)) || printf 'set-up took %d s\n' $((SECONDS - started))
  for signal in INT TERM HUP USR1; do
    # shellcheck disable=SC2064
    trap "stop $signal" "$signal"
  done
  # If this shell is killed, the running stage is stopped too, and can be continued.
  export RECIPE_RUN_ALL=$$
  if $dry; then
    RECIPE_WOULD_RUN=$(mktemp)
    export RECIPE_WOULD_RUN
    trap 'rm -f "$RECIPE_WOULD_RUN"' EXIT
  fi
  "$python" -m recipe.run.check --recipe "$recipe" --from "$from" --to "$to" "${force[@]}" "${overrides[@]}" "${launch[@]}"

  while read -r stage <&3; do
    number=$(basename "$stage")
    number=${number%%_*}
    if ((10#$number < 10#$from || 10#$number > 10#$to)); then continue; fi
    ran=$((ran + 1))
    case $stage in
      *.sh) run_stage bash "$stage" --recipe "$recipe" "${common[@]}" "${launch[@]}" ;;
      *) run_stage "$python" "$stage" --recipe "$recipe" "${common[@]}" ;;
    esac
  done 3< <(stages)
  ((ran)) || refuse "no stage between $from and $to"
  if $dry; then exit "$refused"; fi
  printf '\n'
  summary=$("$python" -m recipe.export.summary --recipe "$recipe" "${overrides[@]}")
  printf '%s\n' "$summary"
  "$python" -m recipe.export.html_report --recipe "$recipe" "${overrides[@]}"
  printf '\nTotal time: %d s\n' $((SECONDS - started))
  if [[ $summary == *$'\n12_finetune '* ]]; then
    printf 'Talk to the model: %s%s fine-tuning/chat.py --recipe %s\n' \
      "${RECIPE_PYTHON:+PYTHONPATH=pretrain }" "${python#"$here"/}" "$recipe"
  fi
}

main "$@"
exit
