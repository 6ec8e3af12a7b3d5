import type { Series } from "./chart.tsx"

interface Props {
  id: string
  title: string
  series: Series[]
  at: number
  format: (value: number) => string
}

/** Names what is drawn, with its values at the moment that is pointed at: legend and readout in one. */
export function Legend({ id, title, series, at, format }: Props) {
  return (
    <table class="chart-legend" aria-label={`${title}, values`}>
      <tbody>
        {series.map(({ name, slot, values, area }) => {
          const value = values[at] ?? null
          return (
            <tr key={name}>
              <td>
                <svg width="22" height="12" aria-hidden="true">
                  {area ? (
                    <rect width="22" height="12" rx="2" fill={`url(#${id}-p${slot})`} />
                  ) : (
                    <path class={`line s${slot}`} d="M0,6H22" />
                  )}
                </svg>
              </td>
              <th scope="row" title={name}>
                {name}
              </th>
              <td class="number">{value === null ? "–" : format(value)}</td>
            </tr>
          )
        })}
      </tbody>
    </table>
  )
}
