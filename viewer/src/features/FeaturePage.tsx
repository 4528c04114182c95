import "./features.css";
import { api } from "../api";
import { go, href, type Route } from "../state";
import { Icon } from "../ui/icons";
import { useLoad } from "../ui/load";
import { Empty, Progress } from "../ui/parts";
import { FeatureView } from "./FeaturePanel";

/** A page of its own about one feature: `#/feature/<study>/L5/709`. */
export default function FeaturePage({ route }: { route: Route }) {
  const words = route.rest.split("/");
  const [study, feature] = [words.slice(0, -2).join("/"), words.slice(-2).join("/")];
  const { data, error } = useLoad(() => api.feature(study, feature), [study, feature]);
  if (error) return <Empty icon="warn" title={feature}><p>{error}</p></Empty>;
  if (!data) return <Progress fraction={null} text="loading the feature" />;
  return (
    <div class="page feature-page">
      <p class="feature-line">
        <a href={href("features", study)}><Icon name="left" size={12} /> All features</a>
      </p>
      <div class="card">
        <FeatureView feature={data} wide onOpen={(other) => go("feature", `${study}/${other}`)} />
      </div>
    </div>
  );
}
