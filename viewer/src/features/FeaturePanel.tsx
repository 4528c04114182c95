import { Empty } from "../ui/parts";

/** What a feature stands for: examples, histogram, logits, neighbours. `study` "" is the one of the model. */
export function FeaturePanel({ feature }: { study: string; model: string; feature: string }) {
  return <Empty icon="image" title={feature} />;
}
