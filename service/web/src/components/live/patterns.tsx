/** What areas are filled with: a colour and a drawing each, for those who do not tell colours apart. */

const DRAWINGS: Record<number, string> = {
  1: "",
  2: "M0,8L8,0M-2,2L2,-2M6,10L10,6",
  3: "M0,2H8",
  4: "M0,0L8,8M-2,6L2,10M6,-2L10,2",
  5: "M2,0V8",
  6: "M0,2H8M2,0V8",
  7: "M0,8L8,0M0,0L8,8",
  8: "M2,2h1.6M6,6h1.6",
  9: "",
  10: "M0,8L8,0M-2,2L2,-2M6,10L10,6",
}

export function Patterns({ id, slots }: { id: string; slots: number[] }) {
  return (
    <defs>
      {slots.map((slot) => (
        <pattern key={slot} id={`${id}-p${slot}`} width="8" height="8" patternUnits="userSpaceOnUse">
          <rect class={`ink s${slot}`} width="8" height="8" />
          <path class="drawing" d={DRAWINGS[slot] ?? ""} />
        </pattern>
      ))}
    </defs>
  )
}
